"use strict";
// Data, files and elements. Texts of runs are only ever set as text nodes: nothing here parses HTML.

const taken = new Map(); // name → value of the data files that are loaded
const loading = new Map(); // file → promise

function take(name, text) {
  taken.set(name, JSON.parse(text));
}

function loadScript(file) {
  if (!loading.has(file)) {
    loading.set(file, new Promise((done, failed) => {
      const script = document.createElement("script");
      script.src = file;
      script.onload = () => done();
      script.onerror = () => failed(new Error(`${file} is missing in this page's folder`));
      document.head.append(script);
    }));
  }
  return loading.get(file);
}

/** Return the value of data/<name>.js. Throws where the file is gone. */
async function need(name) {
  if (!taken.has(name)) await loadScript(`data/${name}.js`);
  return taken.get(name);
}

/** Make an element. Attributes: "on…" are listeners, others are set as text; children: nodes or texts. */
function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value != null) made.setAttribute(name, value);
  }
  made.append(...children.flat(Infinity).filter((child) => child != null));
  return made;
}

const byId = (id) => document.getElementById(id);
const say = (text) => { byId("told").textContent = text; };

function format(value, decimals) {
  if (value == null) return "";
  const text = value.toFixed(decimals);
  return (/^-0\.?0*$/.test(text) ? text.slice(1) : text).replace("-", "−");
}
const signed = (value, decimals) => {
  const text = format(value, decimals);
  return !text || text.startsWith("−") || !/[1-9]/.test(text) ? text : `+${text}`;
};
const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
const plain = (value) =>
  value == null ? "" : typeof value === "object" ? JSON.stringify(value) : typeof value === "number" && !Number.isInteger(value) ? String(Number(value.toPrecision(6))) : String(value);

function fillSelect(select, options, chosen) {
  select.replaceChildren(...options.map(([value, label]) => el("option", { value }, label)));
  if (options.some(([value]) => String(value) === String(chosen))) select.value = chosen;
}

/** A table of texts: headings, then rows whose first entry is a heading too. Entries may be nodes. */
function plainTable(headings, rows) {
  return el("table", { class: "plain" },
    el("thead", {}, el("tr", {}, headings.map((text) => (text === "" ? el("td") : el("th", { scope: "col" }, text))))),
    el("tbody", {}, rows.map(([name, ...cells]) =>
      el("tr", {}, el("th", { scope: "row" }, name), cells.map((cell) => el("td", {}, cell == null ? "" : cell))))));
}

/** Return the parts of a link: what stands behind #, separated by /, decoded. */
function linkParts() {
  return location.hash.slice(1).split("?")[0].split("/").map((part) => {
    try { return decodeURIComponent(part); } catch { return part; }
  });
}
function itemLink(run, id, sample, task) {
  const asked = [sample ? `sample=${sample}` : "", task ? `task=${encodeURIComponent(task)}` : ""].filter(Boolean).join("&");
  return `#${encodeURIComponent(run)}/${id.split("/").map(encodeURIComponent).join("/")}${asked && `?${asked}`}`;
}

/** A list of many rows by DataTables, which draws one page of it at a time; texts are set as text.
 *
 * headings; count() rows; cell(place, column) → text or node; order(column) → numbers or texts by place to sort by, null:
 * as it is; chosen(place) is called when a row is chosen. Returns {refresh, show(place), step(by), current}. */
function itemList(holder, { headings, label, count, cell, order, chosen }) {
  const table = el("table", { class: "items", "aria-label": label });
  holder.replaceChildren(table);
  let sorted = [], current = -1;
  const grid = new DataTable(table, {
    serverSide: true, processing: false, searching: false, pageLength: 25, lengthChange: false, autoWidth: false, order: [],
    layout: { topStart: null, topEnd: null, bottomStart: "info", bottomEnd: "paging" },
    language: { info: "_START_ to _END_ of _TOTAL_", infoEmpty: "none", emptyTable: "no item", zeroRecords: "no item" },
    columns: headings.map((title) => ({ title, data: null, orderSequence: ["asc", "desc", ""] , render: () => "" })),
    columnDefs: [{ targets: "_all", createdCell: (box, _, row, __, column) => box.replaceChildren(cell(row.place, column) ?? "") }],
    createdRow: (line, row) => {
      line.dataset.place = row.place;
      line.classList.toggle("current", row.place === current);
      if (row.place === current) line.setAttribute("aria-current", "true");
    },
    ajax: (asked, answer) => {
      sorted = [...Array(count()).keys()];
      const [by] = asked.order;
      const keys = by && order(by.column);
      if (keys) {
        const sign = by.dir === "desc" ? -1 : 1;
        sorted.sort((a, b) => sign * (keys[a] < keys[b] ? -1 : keys[a] > keys[b] ? 1 : 0) || a - b);
      }
      answer({
        draw: asked.draw, recordsTotal: sorted.length, recordsFiltered: sorted.length,
        data: sorted.slice(asked.start, asked.start + asked.length).map((place) => ({ place })),
      });
    },
  });
  table.addEventListener("click", (event) => {
    const line = event.target.closest("tr[data-place]");
    if (line && !event.target.closest("a")) choose(Number(line.dataset.place));
  });
  function mark(place) {
    current = place;
    const page = Math.floor(sorted.indexOf(place) / grid.page.len());
    if (page >= 0 && page !== grid.page()) return grid.page(page).draw("page");
    for (const line of table.querySelectorAll("tr[data-place]")) {
      const is = Number(line.dataset.place) === place;
      line.classList.toggle("current", is);
      if (is) line.setAttribute("aria-current", "true"); else line.removeAttribute("aria-current");
    }
  }
  function choose(place) {
    mark(place);
    chosen(place);
  }
  return {
    refresh() { current = -1; grid.ajax.reload(null, true); },
    mark,
    step(by) {
      const at = current < 0 ? (by > 0 ? 0 : -1) : sorted.indexOf(current) + by;
      if (at >= 0 && at < sorted.length) choose(sorted[at]);
      else say(sorted.length ? (by > 0 ? "That was the last item." : "That was the first item.") : "No item.");
    },
  };
}
