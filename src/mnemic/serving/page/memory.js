// The memory of the session that is shown: heat maps of norms and changes, what was read, gates and measures, tensors.

import { $, bytes, count, element } from "./dom.js";
import { heatMap, number } from "./heat.js";

const SHOWN = 3;
const SHARE = /gate|entropy|filled|kept/;
let drawn = null;

export function empty() {
  drawn = null;
  $("view").replaceChildren(element("p", { className: "soft", text: "Nothing has been read yet." }));
}

export function show(view) {
  drawn = view;
  const maps = view.maps.flatMap((map) => mapsOf(map, view.compared_with));
  const parts = [element("p", { className: "soft", text: summary(view) }), ...maps.slice(0, SHOWN)];
  if (view.reads.length) parts.push(reads(view));
  if (Object.keys(view.diagnostics).length) parts.push(measures(view));
  if (maps.length > SHOWN) parts.push(folded(`${maps.length - SHOWN} more maps`, ...maps.slice(SHOWN)));
  parts.push(folded("All tensors", tensors(view)));
  $("view").replaceChildren(...parts);
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawn !== null && show(drawn));

function summary({ memory, bytes: size, version, tokens_open: open }) {
  const held = `${bytes(size.state + size.buffers)} of state as of version ${version}, ${bytes(size.other)} beside it`;
  const written = open === null ? "written at every token" : `${count(open)} tokens since it was last written`;
  return `${memory}: ${held}; ${written}.`;
}

function mapsOf({ name, blocks, rows, each, norms, changes }, before) {
  const [down, across] = each;
  const labels = { rows: rows.map((row) => (blocks ? `block ${row}` : `${row}`)), each: across };
  const together = down * across > 1 ? `, ${count(down * across)} together` : "";
  const made = [heatMap(`${name}: norms${together}`, norms, labels)];
  if (changes !== null) made.push(heatMap(`${name}: change since version ${before}${together}`, changes, labels));
  return made;
}

function reads({ reads: all, tokens_open: open }) {
  const labels = { rows: all.map(({ block }) => `block ${block}`), each: all[0].each };
  const title = `Read in the last ${count(open)} tokens: share of the attention by slot`;
  return heatMap(title, all.map(({ shares }) => shares), labels);
}

function measures({ diagnostics: all, tokens_open: open }) {
  const rows = new Map();
  for (const [name, value] of Object.entries(all)) {
    const cut = name.lastIndexOf("/");
    const block = name.slice(0, Math.max(cut, 0));
    rows.set(block, { ...rows.get(block), [name.slice(cut + 1)]: value });
  }
  const names = [...new Set([...rows.values()].flatMap(Object.keys))];
  const head = element("tr", {}, ...["", ...names].map((text) => element("th", { scope: "col", text: text.replaceAll("_", " ") })));
  const body = [...rows].map(([block, values]) =>
    element("tr", {}, element("th", { scope: "row", text: block.replace(/(\d+)$/, " $1") }), ...names.map((name) => measure(name, values[name]))),
  );
  const title = element("caption", { text: caption(open) });
  return scrolled("Gates and measures", element("table", {}, title, element("thead", {}, head), element("tbody", {}, ...body)));
}

function caption(open) {
  const written = open === null ? "" : `, if it were written now, after ${count(open)} tokens`;
  return `Gates and measures${written}`;
}

function measure(name, value) {
  const cell = element("td", { text: value === undefined ? "" : number(value) });
  // Other numbers have no end to be drawn against.
  if (SHARE.test(name) && value >= 0 && value <= 1) cell.append(element("meter", { max: 1, value, "aria-hidden": "true" }));
  return cell;
}

function tensors({ tensors: all, compared_with: before }) {
  const titles = ["tensor", "shape", "kind", "bytes", "norm", before === null ? "change" : `change since ${before}`];
  const head = element("tr", {}, ...titles.map((text) => element("th", { scope: "col", text })));
  const body = all.map(({ name, shape, dtype, bytes: size, norm, change }) => {
    const cells = [shape.join(" × ") || "one", dtype, count(size), number(norm), number(change)];
    return element("tr", {}, element("th", { scope: "row", text: name }), ...cells.map((text) => element("td", { text })));
  });
  if (all.length === 0) return element("p", { className: "soft", text: "This memory carries keys and values only." });
  return scrolled("Tensors", element("table", {}, element("thead", {}, head), element("tbody", {}, ...body)));
}

function folded(text, ...inside) {
  return element("details", {}, element("summary", { text }), ...inside);
}

function scrolled(label, inside) {
  return element("div", { className: "scroll", role: "region", "aria-label": label, tabIndex: 0 }, inside);
}
