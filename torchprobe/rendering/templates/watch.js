const LOOKS = 5, EVERY = 2000, W = 320, H = 120, LEFT = 46, BOTTOM = 16, TOP = 6;
const byId = (id) => document.getElementById(id);
const make = (name, attributes = {}, ...children) => {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
};
const draw = (name, attributes, text) => {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return node;
};
const shown = (value) => {
  if (value === null || value === undefined) return "–";
  if (Number.isInteger(value) && Math.abs(value) < 1e6) return value.toLocaleString("en");
  return Math.abs(value) >= 1e-3 && Math.abs(value) < 1e6 ? String(Number(value.toPrecision(4))) : value.toExponential(2);
};

const wanted = new URLSearchParams(location.hash.slice(1));
let field = wanted.get("field") || "", before = "", timer = 0, asked = 0;
byId("layers").value = wanted.get("layers") || "";

async function look() {
  clearTimeout(timer);
  const number = ++asked, query = new URLSearchParams({ field, layers: byId("layers").value });
  let problem = "";
  try {
    const answer = await fetch(`data.json?${query}`);
    const text = await answer.text();
    if (number !== asked) return; // a later question was asked meanwhile
    if (!answer.ok) problem = text;
    else update(JSON.parse(text));
  } catch {
    problem = "No answer: torchprobe watch has ended. What was last read is shown.";
  }
  byId("problem").textContent = problem;
  byId("problem").hidden = problem === "";
  timer = setTimeout(look, EVERY);
}

// A page that is drawn again loses the pointer's place, so the age of the files alone only changes its line.
function update(data) {
  const content = JSON.stringify(data, (key, value) => (key === "state" ? undefined : value));
  if (content !== before) { before = content; show(data); }
  else document.querySelectorAll(".state").forEach((node, index) => { node.textContent = data.runs[index].state; });
}

function show(data) {
  field = data.field;
  const select = byId("field");
  if (select.options.length !== data.fields.length) {
    select.replaceChildren(...data.fields.map(({ name }) => make("option", { value: name }, name.replaceAll("_", " "))));
  }
  select.value = field;
  const help = data.fields.find(({ name }) => name === field)?.help;
  const hidden = data.hidden ? ` ${data.hidden} more layers are not shown: choose among them by name.` : "";
  byId("help").textContent = (help ? `${help}.` : "") + hidden;
  byId("runs").replaceChildren(...data.runs.map((run, index) => runHead(run, index, data.runs.length > 1)));
  byId("charts").replaceChildren(...data.layers.map((layer, index) => chart(layer.label, data.runs.map((run) => run.curves[index]), data.runs)));
}

function runHead(run, index, several) {
  const title = make("h2");
  if (several) {
    const key = draw("svg", { viewBox: "0 0 36 12", "aria-hidden": "true" });
    key.append(draw("line", { x1: 0, x2: 36, y1: 6, y2: 6, class: `line l${index % LOOKS}` }));
    title.append(key, run.name);
  }
  const facts = make("dl", { class: "facts" }, ...run.facts.map(({ label, value, note }) =>
    make("div", {}, make("dt", {}, label), make("dd", {}, value, make("small", {}, note)))));
  return make("section", { class: "run", style: "margin-top: 0" }, ...(several ? [title] : []),
    make("p", { class: run.problem ? "state bad" : "state" }, run.state), ...(run.facts.length ? [facts] : []));
}

function chart(label, curves, runs) {
  const figure = make("figure", { class: "chart" }, make("h3", {}, label));
  const present = curves.map((curve) => curve ?? { x: [], y: [] });
  const log = byId("log").checked;
  const usable = (y) => y !== null && (!log || y > 0);
  const xs = present.flatMap(({ x }) => x), ys = present.flatMap(({ y }) => y.filter(usable));
  const svg = draw("svg", { viewBox: `0 0 ${W} ${H}`, preserveAspectRatio: "none", role: "img", "aria-label": `${field} of ${label}` });
  const line = make("p");
  figure.append(svg, line);
  const values = (step) => line.replaceChildren(...present.map((curve, index) => {
    const at = step === null ? curve.x.length - 1 : nearest(curve.x, step);
    const name = runs.length > 1 ? `${runs[index].name} ` : "";
    return make("span", {}, at < 0 ? `${name}–` : `${name}${shown(curve.y[at])} at ${shown(curve.x[at])}`);
  }));
  values(null);
  if (ys.length === 0) { line.textContent = present.some(({ bad }) => bad?.length) ? "nan or inf only" : "–"; return figure; }
  const [x0, x1] = [Math.min(...xs), Math.max(...xs)];
  let [y0, y1] = [Math.min(...ys), Math.max(...ys)];
  const scale = log ? Math.log10 : (y) => y;
  if (y0 === y1) [y0, y1] = log ? [y0 / 2, y1 * 2] : [y0 - (Math.abs(y0) || 1) * 0.05, y1 + (Math.abs(y1) || 1) * 0.05];
  const px = (x) => LEFT + (x1 > x0 ? (x - x0) / (x1 - x0) : 0.5) * (W - LEFT - 4);
  const py = (y) => TOP + (1 - (scale(y) - scale(y0)) / (scale(y1) - scale(y0))) * (H - TOP - BOTTOM);
  svg.setAttribute("preserveAspectRatio", "xMidYMid meet");
  for (const y of [y0, y1]) {
    svg.append(draw("line", { x1: LEFT, x2: W, y1: py(y), y2: py(y), class: "frame" }));
    svg.append(draw("text", { x: LEFT - 5, y: py(y) + 4, "text-anchor": "end" }, shown(y)));
  }
  svg.append(draw("text", { x: LEFT, y: H - 1 }, shown(x0)));
  if (x1 > x0) svg.append(draw("text", { x: W, y: H - 1, "text-anchor": "end" }, shown(x1)));
  present.forEach((curve, index) => {
    let path = "", open = false, alone = null;
    const dot = () => {
      if (alone !== null) svg.append(draw("circle", { cx: px(curve.x[alone]), cy: py(curve.y[alone]), r: 2, class: `d${index % LOOKS}` }));
    };
    curve.x.forEach((x, at) => {
      if (!usable(curve.y[at])) { dot(); open = false; alone = null; return; }
      path += `${open ? "L" : "M"}${px(x).toFixed(1)} ${py(curve.y[at]).toFixed(1)}`;
      alone = open ? null : at;
      open = true;
    });
    dot();
    svg.append(draw("path", { d: path, class: `line l${index % LOOKS}` }));
  });
  present.forEach((curve, index) => (curve.bad ?? []).forEach((x) => {
    const [at, low] = [px(x), H - BOTTOM - 3];
    const cross = draw("path", { d: `M${at - 3} ${low - 3}l6 6m0 -6l-6 6`, class: `cross l${index % LOOKS}` });
    cross.append(draw("title", {}, `nan or inf at ${shown(x)}`));
    svg.append(cross);
  }));
  const cursor = draw("line", { y1: TOP, y2: H - BOTTOM, class: "at", visibility: "hidden" });
  svg.append(cursor);
  svg.addEventListener("pointermove", (event) => {
    const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    const step = x0 + ((point.x - LEFT) / (W - LEFT - 4)) * (x1 - x0);
    const steps = [...new Set(xs)].sort((a, b) => a - b), found = steps[nearest(steps, step)];
    cursor.setAttribute("x1", px(found));
    cursor.setAttribute("x2", px(found));
    cursor.setAttribute("visibility", "visible");
    values(found);
  });
  svg.addEventListener("pointerleave", () => { cursor.setAttribute("visibility", "hidden"); values(null); });
  return figure;
}

const nearest = (numbers, target) => numbers.reduce((best, x, at) =>
  (best < 0 || Math.abs(x - target) < Math.abs(numbers[best] - target) ? at : best), -1);

function chosen() {
  const kept = new URLSearchParams();
  if (field) kept.set("field", field);
  if (byId("layers").value) kept.set("layers", byId("layers").value);
  history.replaceState(null, "", `#${kept}`);
  before = "";
  look();
}
byId("field").addEventListener("change", (event) => { field = event.target.value; chosen(); });
byId("layers").addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(chosen, 250); });
byId("log").addEventListener("change", () => { before = ""; look(); });
byId("choices").addEventListener("submit", (event) => event.preventDefault());
look();
