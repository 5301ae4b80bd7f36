"""The jobs, one file each; every one reads from top to bottom as the way of the data.

Each is the command `scacam NAME …`, the script `python jobs/NAME.py …` of a checkout, and the
function `scacam.jobs.NAME.run(…)` with the same options as keywords. To add a job: a module with
`add_arguments` and `run`, and its line here.
"""

__all__ = ["JOBS", "ON_RAY"]

JOBS = {
    "explain": "Explain a collection of images: class activation maps of every network and method.",
    "evaluate": "Evaluate how well the heatmaps of a run localize, against true boxes or masks.",
    "faithfulness": "Try the heatmaps of a run: are they true to what its networks do, and sane?",
    "audit": "Find the classes and images of a run that may be right for the wrong reason.",
    "report": "Look through a run and write its report: one HTML file that opens anywhere.",
    "browse": "Look around in a run: a local page to choose, sort and see all its images and maps.",
    "compare": "Compare two runs of the same images: which predictions changed, whose maps moved.",
    "pictures": "Draw each photo of a run with its top classes and its heatmaps: one PNG each.",
    "caw": "Relate the class activation weights, class weight and averaged gradient, of networks.",
    "manifest": "Make a manifest, and the table of true boxes, of a data set by its layout.",
}
"""What each job does, in the order of a first use."""

ON_RAY = ("explain", "evaluate", "faithfulness", "audit", "caw")
"""Those that do their work in Ray's processes."""
