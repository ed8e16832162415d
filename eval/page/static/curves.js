// Curves of the training by BokehJS, drawn on demand: zoom by wheel or box, values under the pointer.

const COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#7f7f7f"];
const DASHES = ["solid", "dashed", "dotted", "dotdash"];

/** Return the curves that some of the logs have: their names, and "shares" where terms have some. */
function curveNames(runs) {
  const names = new Set(runs.flatMap((run) => Object.keys(run.log)));
  for (const name of ["step", "epoch"]) names.delete(name);
  const shares = [...names].some((name) => name.startsWith("share_"));
  const first = ["loss", "task"].filter((name) => names.delete(name));
  return [...first, ...(shares ? ["share of each term"] : []), ...[...names].sort()];
}

/** Draw one curve of several runs into `holder`, with the numbers as a table below it. */
async function drawCurves(holder, runs, name) {
  const shown = runs.filter((run) => run.log.step);
  if (!shown.length) return holder.replaceChildren(el("p", { class: "none" }, "no log is at hand"));
  await loadScript("lib/bokeh.js");
  await loadScript("lib/bokeh-api.js");
  const style = getComputedStyle(document.body), ink = style.color, paper = style.backgroundColor;
  const plot = Bokeh.Plotting.figure({
    height: 320, sizing_mode: "stretch_width", tools: "pan,box_zoom,wheel_zoom,reset,save",
    x_axis_label: "step", y_axis_label: name, background_fill_color: paper, border_fill_color: paper, outline_line_color: ink,
  });
  for (const axis of [plot.xaxis, plot.yaxis]) {
    Object.assign(axis, { axis_label_text_color: ink, major_label_text_color: ink, axis_line_color: ink, major_tick_line_color: ink, minor_tick_line_color: ink });
  }
  for (const line of [plot.xgrid, plot.ygrid]) Object.assign(line, { grid_line_alpha: 0.25 });
  const lines = [];
  for (const [place, run] of shown.entries()) {
    const names = name === "share of each term" ? Object.keys(run.log).filter((key) => key.startsWith("share_")) : [name];
    for (const [number, key] of names.entries()) {
      const values = run.log[key];
      if (!values) continue;
      const label = names.length > 1 ? `${run.label} ${key.slice(6)}` : run.label;
      const colour = COLOURS[(names.length > 1 ? number : place) % COLOURS.length];
      const dash = DASHES[(names.length > 1 ? place : Math.floor(place / COLOURS.length)) % DASHES.length];
      const source = new Bokeh.ColumnDataSource({ data: { x: run.log.step, y: values.map((y) => y ?? NaN), run: values.map(() => label) } });
      const drawn = plot.line({ field: "x" }, { field: "y" }, { source, line_color: colour, line_width: 2, line_dash: dash, legend_label: label });
      plot.add_tools(new Bokeh.HoverTool({ renderers: [drawn], tooltips: [["run", "@run"], ["step", "@x"], [key, "@y{0.0000}"]] }));
      lines.push([label, values]);
    }
  }
  if (plot.legend) Object.assign(plot.legend, { click_policy: "hide", background_fill_color: paper, background_fill_alpha: 0.8, label_text_color: ink, border_line_color: ink });
  const place = el("div", { class: "plot", role: "group", "aria-label": `${name} over the steps of ${shown.length} runs; the numbers are in the table below` });
  const numbers = el("details", {}, el("summary", {}, "the numbers"), el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "The curve's numbers" },
    plainTable(["", "first", "lowest", "highest", "last"], lines.map(([label, values]) => {
      const known = values.filter((value) => value != null);
      return [label, ...[known[0], Math.min(...known), Math.max(...known), known.at(-1)].map(plain)];
    }))));
  holder.replaceChildren(place, numbers);
  await Bokeh.Plotting.show(plot, place);
}
