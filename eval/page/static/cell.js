// A cell: its runs side by side, their curves, scores, settings, commands and files.

let cellState = { row: 0, column: 0, beside: 0, runs: [], others: [] };

function startCell() {
  for (const key of ["row", "column", "beside"]) {
    byId(`cell-${key}`).addEventListener("change", () => {
      const { row, column, beside } = { ...cellState, [key]: Number(byId(`cell-${key}`).value) };
      location.hash = `/cell/${row}/${column}/${beside}`;
    });
  }
  byId("curve").addEventListener("change", showCurves);
  byId("curve-beside").addEventListener("change", showCurves);
}

/** Return a run's value in a cell. */
const ownValue = (run, cell, decimals) => (cell.runs.includes(run.id) && format(cell.values[run.seed] ?? null, decimals)) || "–";

/** Load the runs behind a cell, each with its label; those without a result are left out. */
async function runsOfCell(row, column) {
  const page = taken.get("page");
  const wanted = page.rows[row].cells[column].all_runs;
  const listed = page.runs.filter((run) => wanted.includes(run.id));
  return Promise.all(listed.map(async (run) => {
    const found = await need(`run-${run.number}`);
    return { ...found, listed: run, label: `${page.rows[row].names.filter(Boolean).join(", ")}, seed ${run.seed ?? "–"}` };
  }));
}

async function showCell([row = 0, column = 0, beside]) {
  const page = taken.get("page");
  row = Math.min(Number(row) || 0, page.rows.length - 1);
  column = Math.min(Number(column) || 0, page.columns.length - 1);
  const near = beside === undefined ? (row + 1 < page.rows.length ? row + 1 : Math.max(row - 1, 0)) : Math.min(Number(beside) || 0, page.rows.length - 1);
  cellState = { row, column, beside: near, runs: [], others: [] };
  for (const key of ["row", "column", "beside"]) byId(`cell-${key}`).value = cellState[key];
  const shown = page.columns[column], cell = page.rows[row].cells[column];
  byId("cell-heading").textContent = `${page.rows[row].names.filter(Boolean).join(", ")}: ${shown.heading}`;
  const paper = cell.paper ? ` Paper: ${cell.paper} (${cell.paper_source}), difference ${cell.difference_text}.` : "";
  const interval = cell.low == null ? "" : `, 95 % interval over seeds ${format(cell.low, shown.decimals)} to ${format(cell.high, shown.decimals)}`;
  byId("cell-value").textContent = cell.n ? `${cell.text} over ${cell.n} of ${cell.planned} runs${interval}.${paper}` : `No value: ${cell.status}.${paper}`;
  byId("cell-compare").href = `#/compare/${column}/${row}/${near}`;
  byId("cell-compare").hidden = !shown.task;
  const lost = cell.lost.map((one) => `${one.run_id}: ${one.status}${one.error ? `, ${one.error}` : ""}`);
  const runs = await runsOfCell(row, column), others = await runsOfCell(near, column);
  const absent = cell.all_runs.filter((id) => !runs.some((run) => run.listed.id === id)).map((id) => `${id} has no result`);
  const missing = [...lost, ...absent, ...runs.flatMap((run) => run.missing.map((text) => `${run.id}: ${text}`))];
  byId("cell-missing").replaceChildren(...(missing.length ? [el("ul", { class: "missing" }, missing.map((text) => el("li", {}, text)))] : []));
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.facts)))];
  const link = (run) => Object.entries(run.listed.tasks).filter(([, task]) => task.n).map(([task, { n }]) =>
    el("a", { href: `#/answers/${encodeURIComponent(run.id)}/${encodeURIComponent(task)}` }, `${n} answers to ${task}`));
  byId("cell-runs").replaceChildren(plainTable(["", ...runs.map((run) => run.id)], [
    ...(shown.mean_of.length ? page.columns.filter((one) => shown.mean_of.includes(one.label)) : [shown]).map((one) =>
      [one.label, ...runs.map((run) => ownValue(run, page.rows[row].cells[one.place], one.decimals))]),
    ["seed", ...runs.map((run) => plain(run.seed))],
    ["answers", ...runs.map((run) => el("span", { class: "links" }, link(run)))],
    ...names.map((name) => [name, ...runs.map((run) => plain(run.facts[name]))]),
    ...Object.keys(runs[0]?.gradient_shares ?? {}).map((term) => [`gradient of ${term}, share of the task's`, ...runs.map((run) => plain(run.gradient_shares[term]))]),
  ]));
  cellState.runs = runs;
  cellState.others = near === row ? [] : others;
  fillSelect(byId("curve"), curveNames(runs).map((name) => [name, name]), byId("curve").value);
  byId("cell-scores").replaceChildren(plainTable(["", "seed", "value", "95 % interval over items", "items", "invalid", "cut"], runs.flatMap((run) =>
    run.scores.map((one) => [`${one.task} ${one.metric}`, plain(run.seed), plain(one.value), one.low == null ? "" : `${plain(one.low)} to ${plain(one.high)}`, plain(one.n), plain(one.invalid), plain(one.num_truncated)]))));
  byId("cell-settings").replaceChildren(settingsTable(runs, cellState.others, near));
  byId("cell-commands").replaceChildren(...runs.filter((run) => run.command).map((run) =>
    el("p", { class: "command" }, el("code", {}, run.command), " ", copyButton(run.command, "The command"))));
  byId("cell-files").replaceChildren(...runs.map((run) => el("details", {}, el("summary", {}, `${run.id}: ${run.files.length} files`),
    el("ul", {}, run.files.map(([name, size]) => el("li", {}, `${name} (${size.toLocaleString("en")} bytes)`))))));
  await showCurves();
}

function settingsTable(runs, others, near) {
  const page = taken.get("page"), base = runs[0]?.base_config ?? {};
  const columns = [...runs, ...others.slice(0, 1)];
  const keys = [...new Set(columns.flatMap((run) => Object.keys(run.config)))].filter((key) => {
    const values = columns.map((run) => JSON.stringify(run.config[key]));
    return new Set(values).size > 1 || (Object.keys(base).length && JSON.stringify(base[key]) !== values[0]);
  });
  if (!keys.length) return el("p", {}, "No setting differs.");
  return plainTable(["", "base", ...runs.map((run) => run.id), ...others.slice(0, 1).map(() => `beside: ${page.rows[near].names.filter(Boolean).join(", ")}`)],
    keys.map((key) => [key, plain(base[key]), ...columns.map((run) => plain(run.config[key]))]));
}

async function showCurves() {
  const { runs, others } = cellState;
  await drawCurves(byId("curves"), byId("curve-beside").checked ? [...runs, ...others] : runs, byId("curve").value);
}
