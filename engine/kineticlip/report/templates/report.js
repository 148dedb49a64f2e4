"use strict";
// The page is whole without this: it adds sorting, a filter and read-outs of the matrices.
const data = JSON.parse(document.getElementById("data").textContent);

const keyOf = (row, column) => {
  const text = row.cells[column].textContent.trim();
  const value = parseFloat(text.replaceAll(",", ""));
  return Number.isNaN(value) ? text : value;
};

const compare = (a, b) => {
  if (typeof a === typeof b) return typeof a === "number" ? a - b : a.localeCompare(b);
  return typeof a === "number" ? -1 : 1; // numbers before what has none
};

for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    if ("sorted" in head.dataset) head.ariaSort = "ascending";
    const numeric = head.classList.contains("numeric");
    button.addEventListener("click", () => {
      const down = head.ariaSort === "ascending" || (numeric && !head.ariaSort);
      heads.forEach((other) => { other.ariaSort = null; });
      head.ariaSort = down ? "descending" : "ascending";
      const rows = [...body.rows].map((row) => [column ? keyOf(row, column) : row.cells[0].textContent, row]);
      rows.sort(([a], [b]) => (down && typeof a === typeof b ? compare(b, a) : compare(a, b)));
      body.append(...rows.map(([, row]) => row));
    });
  });
  if (body.rows.length > 14) {
    const filter = document.createElement("input");
    filter.type = "search";
    filter.placeholder = "Filter classes";
    filter.ariaLabel = "Filter classes";
    filter.addEventListener("input", () => {
      const wanted = filter.value.toLowerCase();
      for (const row of body.rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
    });
    table.closest(".scroll").before(filter);
  }
}

for (const svg of document.querySelectorAll("svg[data-matrix]")) {
  const run = data.runs[svg.dataset.run];
  const names = run.class_names;
  const readout = svg.closest("figure, section").querySelector(".readout")
    ?? svg.closest("section").querySelector(".readout");
  const counts = new Map(run.confusion.map(([truth, prediction, count]) => [truth * names.length + prediction, count]));
  const say = {
    confusion: (row, column) => `${names[row]} \u2192 ${names[column]}: ${counts.get(row * names.length + column) ?? 0}`,
    classifier: (row, column) => `${names[row]} \u00b7 ${names[column]}`
      + (run.classifier.cosines ? `: ${run.classifier.cosines[row][column].toFixed(3)}` : ""),
  }[svg.dataset.matrix];
  readout.hidden = false;
  readout.textContent = "Point at a cell to read it.";
  svg.addEventListener("pointermove", (event) => {
    const box = svg.querySelector("image").getBoundingClientRect();
    const column = Math.floor((names.length * (event.clientX - box.left)) / box.width);
    const row = Math.floor((names.length * (event.clientY - box.top)) / box.height);
    if (row >= 0 && column >= 0 && row < names.length && column < names.length) readout.textContent = say(row, column);
  });
}

const openTarget = () => {
  const target = document.getElementById(location.hash.slice(1));
  if (target instanceof HTMLDetailsElement) target.open = true;
};
addEventListener("hashchange", openTarget);
addEventListener("beforeprint", () => document.querySelectorAll("details.run").forEach((run) => { run.open = true; }));
openTarget();
