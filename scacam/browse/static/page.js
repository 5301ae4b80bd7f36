// The page asks for rows as one scrolls, and pictures as they come into view. What it shows is in
// its address, so that a view can be kept and sent on. Text goes in as text, never as HTML.

const form = document.querySelector("#question");
const grid = document.querySelector("#grid");
const end = document.querySelector("#end");
const count = document.querySelector("#count");
const dialog = document.querySelector("#image");
const content = document.querySelector("#content");
const field = (name) => form.elements[name];
const AT_ONCE = 60;

let about;
let shown = { rows: [], total: 0, asked: null };

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

async function get(path, parameters = {}) {
  const response = await fetch(`${path}?${new URLSearchParams(parameters)}`);
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(answer.error || response.statusText);
  return answer;
}

const percent = (share) => `${(100 * share).toFixed(share < 0.1 ? 1 : 0)}\u202f%`;
const counted = (number, what) =>
  `${number.toLocaleString("en")} ${what}${number === 1 ? "" : "s"}`;
const basename = (uri) => uri.split("/").pop();

// A map is a method of a layer.
const mapsOf = (network) => about.maps.filter((one) => one.network === network);

function fill(select, options, chosen) {
  select.replaceChildren(
    ...options.map(({ value, title }) => {
      const option = element("option", { value }, title);
      option.selected = value === chosen;
      return option;
    }),
  );
}

// What the form asks, as the server's parameters.
function question() {
  const network = field("network").value;
  const [layer, method] = JSON.parse(field("map").value);
  const asked = { network, layer, method };
  const name = field("class_name").value.trim();
  if (name) {
    const found = (about.classes[network] || []).find((one) => one.name === name);
    if (!found) throw new Error(`no image has the top class “${name}”`);
    asked.class_id = found.class_id;
  }
  for (const key of ["outcome", "least", "most", "finding", "order"])
    if (field(key).value) asked[key] = field(key).value;
  return asked;
}

async function ask() {
  const state = new URLSearchParams(new FormData(form));
  for (const [key, value] of [...state]) if (!value) state.delete(key);
  history.replaceState(null, "", `#${state}`);
  grid.replaceChildren();
  end.textContent = "";
  const token = {};
  shown = { rows: [], total: 0, asked: token };
  document.querySelector("#downloads").hidden = field("show").value !== "";
  try {
    if (field("show").value === "") {
      shown.question = question();
      const parameters = new URLSearchParams(shown.question);
      for (const link of document.querySelectorAll("#downloads a"))
        link.href = `selection.${link.dataset.kind}?${parameters}`;
    }
    await more(token);
  } catch (error) {
    if (shown.asked === token) complain(error);
  }
}

function complain(error) {
  count.textContent = "";
  end.textContent = error.message;
}

let loading = false;
async function more(token = shown.asked) {
  if (loading && token === shown.asked && shown.rows.length) return;
  loading = true;
  try {
    const failed = field("show").value;
    const offset = shown.rows.length;
    const answer = failed
      ? await get("api/errors", { error: failed === "errors" ? "" : failed, offset })
      : await get("api/images", { ...shown.question, offset, limit: AT_ONCE });
    if (shown.asked !== token) return;
    const first = shown.rows.length;
    shown.rows.push(...answer.rows);
    shown.total = answer.total;
    grid.append(...answer.rows.map((row, at) => (failed ? failure(row) : tile(row, first + at))));
    count.textContent = counted(shown.total, "image");
    end.textContent = shown.rows.length < shown.total ? "…" : shown.total ? "" : "no such image";
  } finally {
    loading = false;
  }
}

function picture(image_id, parameters, alt) {
  const address = `maps/${image_id}.webp?${new URLSearchParams(parameters)}`;
  return element("img", { src: address, alt, loading: "lazy", decoding: "async" });
}

function tile(row, at) {
  const { network, layer, method } = shown.question;
  const class_id = row.class_id;
  const notes = [basename(row.uri)];
  if (row.overlap != null) notes.push(`overlap ${percent(row.overlap)}`);
  if (row.score != null) notes.push(`score ${row.score.toFixed(2)}`);
  const said = element("span", { class: "said" }, `${row.class_name} ${percent(row.probability)}`);
  if (row.label !== null) {
    const right = row.label === row.class_id;
    const mark = right ? " ✓" : ` ✗ ${row.label_name}`;
    said.append(element("span", { class: right ? "right" : "wrong" }, mark));
  }
  const alt = `${method} for ${row.class_name} over ${basename(row.uri)}`;
  const frame = element("span", { class: "frame" });
  frame.append(picture(row.image_id, { network, layer, method, class_id }, alt));
  const button = element("button", { type: "button", title: row.uri }, frame, said);
  button.append(element("span", { class: "more" }, notes.join(" · ")));
  button.addEventListener("click", () => open(at));
  return element("li", {}, button);
}

function failure(row) {
  const title = element("strong", {}, `${row.error} `);
  return element("li", { class: "error" }, title, row.uri, element("span", { class: "more" }, row.message || ""));
}

let opened = 0;
async function open(at) {
  if (at < 0 || at >= shown.total) return;
  if (at >= shown.rows.length) await more();
  opened = at;
  const row = shown.rows[at];
  const answer = await get(`api/images/${row.image_id}`);
  const right = answer.label === null ? "" : ` · label: ${row.label_name}`;
  const size = `${answer.width} × ${answer.height}${right} · image ${row.image_id}`;
  const photo = `photos/${row.image_id}.webp?size=large`;
  content.replaceChildren(
    element("h2", { id: "title" }, basename(answer.uri)),
    element("p", { class: "line" }, `${answer.uri} · ${size}`),
    element("figure", { class: "photo" }, element("img", { src: photo, alt: `the photo ${basename(answer.uri)}` })),
    ...answer.networks.flatMap((network) => ofNetwork(row.image_id, network)),
  );
  if (!dialog.open) dialog.showModal();
  dialog.scrollTop = 0;
}

// The maps of one class of one network, and buttons for its other classes.
function ofNetwork(image_id, { network, classes }) {
  const gallery = element("div", { class: "maps" });
  const evidence = element("p", { class: "line" });
  const buttons = classes.map((one) => {
    const title = `${one.class_name} ${percent(one.probability)}${one.rank === null ? " (label)" : ""}`;
    const button = element("button", { type: "button", "aria-pressed": "false" }, title);
    button.addEventListener("click", () => show(one, button));
    return button;
  });
  function show(one, button) {
    for (const other of buttons) other.setAttribute("aria-pressed", String(other === button));
    const channels = one.channels.map(([channel, adds]) => `${channel} (${adds.toFixed(2)})`);
    evidence.textContent = `The channels that add most to its logit: ${channels.join(", ")}`;
    evidence.hidden = !channels.length;
    gallery.replaceChildren(
      ...mapsOf(network).map(({ layer, method, name }) => {
        const parameters = { network, layer, method, class_id: one.class_id };
        const shownMap = picture(image_id, parameters, `${name} for ${one.class_name}`);
        return element("figure", {}, shownMap, element("figcaption", {}, name));
      }),
    );
  }
  show(classes[0], buttons[0]);
  return [element("h3", {}, network), element("div", { class: "classes" }, ...buttons), gallery, evidence];
}

dialog.addEventListener("click", ({ target }) => {
  if (target.dataset.step) open(opened + Number(target.dataset.step));
  if (target === dialog || "close" in target.dataset) dialog.close();
});
dialog.addEventListener("close", () => grid.children[opened]?.querySelector("button")?.focus());
dialog.addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (step) {
    event.preventDefault();
    open(opened + step);
  }
});

new IntersectionObserver(
  ([entry]) => {
    if (entry.isIntersecting && shown.rows.length && shown.rows.length < shown.total)
      more().catch(complain);
  },
  { rootMargin: "800px" },
).observe(end);

function renew() {
  const chosen = field("map").value;
  const options = mapsOf(field("network").value).map(({ layer, method, name }) =>
    ({ value: JSON.stringify([layer, method]), title: name }));
  const preferred = options.find(({ value }) => value === chosen) ||
    options.find(({ title }) => title === "sca_cam") || options[0];
  fill(field("map"), options, preferred.value);
  const classes = about.classes[field("network").value] || [];
  document.querySelector("#classes").replaceChildren(
    ...classes.map(({ name, images }) => element("option", { value: name }, counted(images, "image"))),
  );
}

// Of a finding, its network's maps, the image that shows it most first.
function follow(chosen) {
  const found = about.findings.find(({ finding }) => String(finding) === chosen);
  if (found && field("network").value !== found.network) {
    field("network").value = found.network;
    renew();
  }
  field("order").value = found ? "score" : "";
}

form.addEventListener("submit", (event) => event.preventDefault());
form.addEventListener("change", ({ target }) => {
  if (target.name === "network") renew();
  if (target.name === "finding") follow(target.value);
  ask();
});

async function start() {
  about = await get("api/run");
  const networks = [...new Set(about.maps.map((one) => one.network))];
  fill(field("network"), networks.map((value) => ({ value, title: value })));
  const finding = ({ finding, title, class_name, network }) =>
    ({ value: String(finding), title: `${class_name} ${title} · ${network}` });
  fill(field("finding"), [{ value: "", title: "any" }, ...about.findings.map(finding)], "");
  const errors = Object.entries(about.errors);
  const failed = errors.map(([value, many]) => ({ value, title: `errors: ${value} (${many})` }));
  fill(field("show"), [{ value: "", title: "explained" }, { value: "errors", title: "all errors" }, ...failed], "");
  document.querySelector("#outcomes").hidden = !about.labelled;
  document.querySelector("#found").hidden = !about.findings.length;
  document.querySelector("#failed").hidden = !errors.length;
  field("order").querySelector("[value=overlap]").hidden = !about.evaluated;
  field("order").querySelector("[value=score]").hidden = !about.findings.length;
  const state = new URLSearchParams(location.hash.slice(1));
  if (state.has("network")) field("network").value = state.get("network");
  renew();
  for (const [key, value] of state) if (field(key) && key !== "network") field(key).value = value;
  await ask();
}

start().catch(complain);
