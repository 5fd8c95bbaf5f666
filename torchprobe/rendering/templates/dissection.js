{
  // Names and labels come from files: they are set as text and attributes, never as markup.
  const data = JSON.parse(document.getElementById("data").textContent);
  const table = document.getElementById("table");
  const element = (name, attributes = {}, ...children) => {
    const svg = ["svg", "image", "path"].includes(name);
    const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    node.append(...children);
    return node;
  };

  const panel = (index, description, ...paths) => {
    const [, jpeg, width, height, rows, columns] = data.thumbnails[index];
    const image = { href: `data:image/jpeg;base64,${jpeg}`, width: columns, height: rows, preserveAspectRatio: "none" };
    const box = { viewBox: `0 0 ${columns} ${rows}`, preserveAspectRatio: "none", role: "img", "aria-label": description };
    const svg = element("svg", box, element("image", image), ...paths.map(([kind, d]) => element("path", { class: kind, d, "fill-rule": "evenodd" })));
    svg.style.aspectRatio = `${width} / ${height}`;
    return svg;
  };
  const blank = (text) => element("div", { class: "blank" }, text);

  const picture = ([index, score, region, concept, whole, evidence], label) => {
    const [name, , , , rows, columns] = data.thumbnails[index];
    const frame = `M0 0h${columns}v${rows}h-${columns}z`;
    const panels = [panel(index, region ? `${name}, where the unit is above its threshold` : name, ...(region ? [["casing", region], ["region", region]] : []))];
    if (whole) panels.push(blank(`“${label}” is a label of the whole picture`));
    else if (concept) panels.push(panel(index, `${name}, where “${label}” is`, ["outside", frame + concept]));
    else if (label && data.annotated) panels.push(blank(concept === "" ? `no “${label}” here` : "not annotated for this category"));
    if (evidence !== null) panels.push(panel(evidence, `${name}, evidence for the unit`));
    const caption = (score === null ? "" : `${score.toPrecision(3)} · `) + name;
    return element("figure", {}, element("div", { class: "panels" }, ...panels), element("figcaption", { title: name }, caption));
  };

  const draw = (strip) => {
    const body = strip.closest("tbody");
    strip.replaceChildren(...data.units[body.dataset.at].map((shown) => picture(shown, body.dataset.label)));
  };
  // Pictures are drawn only near the window, so thousands of units cost no more than one screen.
  const watcher = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting, boundingClientRect } of entries) {
      if (isIntersecting) {
        target.style.minHeight = "";
        draw(target);
      } else if (target.firstChild) {
        if (boundingClientRect.height) target.style.minHeight = `${boundingClientRect.height}px`; // keeps the scroll position
        target.replaceChildren();
      }
    }
  }, { rootMargin: "600px" });

  if (table) {
    const [search, category, detectors, pictures, found, none] = ["search", "category", "detectors", "pictures", "found", "none"].map((id) => document.getElementById(id));
    const units = [...table.tBodies].map((body) => ({
      body,
      number: body.id.slice("unit-".length),
      text: [body.dataset.label, body.dataset.category, body.dataset.search].join("\n").toLowerCase(),
    }));
    let exact = null; // the label of the bar that was clicked: only units with exactly this label
    const filter = () => {
      const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      let count = 0;
      for (const { body, number, text } of units) {
        const of = body.dataset;
        const matches = exact ? of.label === exact : words.every((word) => number === word || text.includes(word));
        body.hidden = !(matches && (!category.value || of.category === category.value) && (!detectors.checked || of.detector === "1"));
        count += !body.hidden;
      }
      found.value = count === units.length ? `${count} units` : `${count} of ${units.length} units`;
      none.hidden = count > 0;
    };
    const show = () => table.classList.toggle("with-pictures", pictures.checked);
    search.addEventListener("input", () => { exact = null; filter(); });
    category.addEventListener("change", filter);
    detectors.addEventListener("change", filter);
    pictures.addEventListener("change", show);
    search.form.addEventListener("submit", (event) => event.preventDefault());
    for (const bar of document.querySelectorAll(".bar")) {
      bar.addEventListener("click", () => {
        exact = search.value = bar.dataset.label;
        category.value = bar.dataset.category;
        detectors.checked = true;
        filter();
        document.getElementById("units").scrollIntoView();
      });
    }
    for (const link of document.querySelectorAll(".concepts a")) {
      link.addEventListener("click", () => { // a unit that is filtered out cannot come into view
        exact = null;
        search.value = category.value = "";
        detectors.checked = false;
        filter();
      });
    }
    show();
    filter();
    for (const strip of table.querySelectorAll(".strip")) watcher.observe(strip);
  }
}
