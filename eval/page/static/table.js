// The table: what its cells show, which rows and columns.

let grid = null;

function startTable() {
  const page = taken.get("page");
  const head = byId("table").querySelectorAll("thead th");
  grid = new DataTable("#table", {
    paging: false, info: false, order: [], autoWidth: false,
    layout: { topStart: null, topEnd: null, bottomStart: null, bottomEnd: null },
    columnDefs: [{ targets: "_all", orderSequence: ["asc", "desc", ""] }],
  });
  for (const filter of document.querySelectorAll(".row-filter")) {
    filter.addEventListener("change", () => {
      const column = Number(filter.dataset.column);
      grid.search.fixed(`name${column}`, (_, __, index) => !filter.value || page.rows[index].names[column] === filter.value);
      grid.draw();
      say(`${grid.rows({ search: "applied" }).count()} of ${page.rows.length} rows`);
    });
  }
  byId("column-choice").append(...[...head].map((heading, number) => {
    const used = number > 2 || page.rows.some((row) => row.names[number]);
    if (!used) grid.column(number).visible(false);
    const box = el("input", { type: "checkbox", checked: used, onchange: () => grid.column(number).visible(box.checked) });
    return el("label", {}, box, ` ${heading.textContent.trim()}`);
  }));
  const seeds = [...new Set(page.rows.flatMap((row) => row.cells.flatMap((cell) => Object.keys(cell.values))))];
  byId("shown").append(...seeds.map((seed) => el("option", { value: `seed ${seed}` }, `seed ${seed}`)));
  byId("shown").addEventListener("change", showCells);
  byId("against").addEventListener("change", showCells);
}

function showCells() {
  const page = taken.get("page"), mode = byId("shown").value, against = page.rows[Number(byId("against").value)];
  byId("against-label").hidden = mode !== "difference";
  grid.cells().every(function () {
    const link = this.node().querySelector("a[data-cell]");
    if (!link) return;
    const [row, column] = link.dataset.cell.split(" ").map(Number);
    const { decimals } = page.columns[column], cell = page.rows[row].cells[column];
    const [text, value] = cellText(mode, cell, against.cells[column], decimals);
    link.textContent = text || "–";
    this.node().dataset.order = value ?? "";
    const isMean = !mode.startsWith("seed "); // count and rank are the mean's
    for (const sign of this.node().querySelectorAll(".count, .sign")) sign.hidden = !isMean;
    if (cell.mark) this.node().classList.toggle(cell.mark, isMean);
  });
  grid.rows().invalidate("dom").draw();
}

/** Return what a cell shows in a mode, and the number that it is sorted by. */
function cellText(mode, cell, against, decimals) {
  if (!cell.n) return [cell.status === "missing" ? "" : cell.status, null];
  if (mode === "interval") {
    const between = cell.low == null ? " (one seed)" : ` [${format(cell.low, decimals)}, ${format(cell.high, decimals)}]`;
    return [format(cell.mean, decimals) + between, cell.mean];
  }
  if (mode === "seeds") {
    return [Object.entries(cell.values).map(([seed, value]) => `${seed}: ${format(value, decimals)}`).join(", "), cell.mean];
  }
  if (mode === "difference") {
    const difference = against.n ? cell.mean - against.mean : null;
    return [signed(difference, decimals), difference];
  }
  if (mode.startsWith("seed ")) {
    const value = cell.values[mode.slice(5)];
    return [format(value, decimals), value];
  }
  return [cell.text, cell.mean];
}
