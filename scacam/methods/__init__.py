"""Every class activation map, one function each; see `maps`."""

from scacam.methods.maps import (
    METHODS,
    Method,
    eigen_cam,
    eigen_grad_cam,
    extent_cam,
    feature_map,
    gap_cam,
    grad_cam,
    grad_cam_elementwise,
    grad_cam_pp,
    hires_cam,
    layer_cam,
    sca_cam,
    sca_cam_signed,
    xgrad_cam,
)

__all__ = [
    "METHODS",
    "Method",
    "eigen_cam",
    "eigen_grad_cam",
    "extent_cam",
    "feature_map",
    "gap_cam",
    "grad_cam",
    "grad_cam_elementwise",
    "grad_cam_pp",
    "hires_cam",
    "layer_cam",
    "sca_cam",
    "sca_cam_signed",
    "xgrad_cam",
]
