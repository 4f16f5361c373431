// Sorts a table by the column whose header is clicked, or pressed by keyboard: numbers first fall, names first rise,
// and cells without a value stay last.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const headers = [...table.querySelectorAll("th[aria-sort]")];
  for (const header of headers) {
    const column = Number(header.dataset.column);
    const compare = column === 0 ? (a, b) => a.localeCompare(b) : (a, b) => a - b;
    header.querySelector("button").addEventListener("click", () => {
      const other = { ascending: "descending", descending: "ascending" };
      const order = other[header.getAttribute("aria-sort")] ?? (column === 0 ? "ascending" : "descending");
      for (const each of headers) each.setAttribute("aria-sort", each === header ? order : "none");
      const sign = order === "ascending" ? 1 : -1;
      const rows = [...body.rows].sort((one, two) => {
        const [a, b] = [one, two].map((row) => row.cells[column].dataset.value);
        if (a === undefined || b === undefined) return (a === undefined) - (b === undefined);
        return sign * compare(a, b);
      });
      body.append(...rows);
    });
  }
}
