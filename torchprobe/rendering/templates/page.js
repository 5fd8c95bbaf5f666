for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.parentElement, table = head.closest("table");
    const grouped = table.classList.contains("grouped"); // each body moves as a whole, by its first row
    const numeric = head.classList.contains("n");
    const up = head.hasAttribute("aria-sort") ? head.getAttribute("aria-sort") === "descending" : !numeric;
    for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const key = (row) => {
      const data = (grouped ? row.rows[0] : row).cells[head.cellIndex];
      return numeric ? (data.dataset.v === "" ? NaN : Number(data.dataset.v)) : data.textContent;
    };
    const compare = (a, b) => {
      const x = key(a), y = key(b);
      if (!numeric) return (up ? 1 : -1) * x.localeCompare(y, undefined, { numeric: true });
      if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y); // what has no value goes last
      return up ? x - y : y - x;
    };
    if (grouped) table.append(...[...table.tBodies].sort(compare));
    else table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compare));
  });
}
