// Sorting by any column, filtering by words and by fields.
(() => {
  const table = document.getElementById("layouts");
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  const rows = [...body.rows];
  rows.forEach((row) => { row.fields = new Map(row.dataset.fields.split(" ").map((f) => f.split(/=(.*)/s).slice(0, 2))); });

  heads.forEach((head, column) => head.firstChild.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    heads.forEach((h) => h.setAttribute("aria-sort", "none"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const numbers = rows.every((row) => row.cells[column].dataset.v !== "" && !isNaN(row.cells[column].dataset.v));
    const compare = (a, b) => {
      const [x, y] = [a.cells[column].dataset.v, b.cells[column].dataset.v];
      return (numbers ? x - y : x.localeCompare(y)) * (down ? -1 : 1) || rows.indexOf(a) - rows.indexOf(b);
    };
    body.append(...[...rows].sort(compare));
  }));

  const input = document.getElementById("filter");
  const fits = document.getElementById("fits-only");
  const count = document.getElementById("filter-count");
  const tests = { "=": (a, b) => a === b, "<": (a, b) => a < b, ">": (a, b) => a > b, "<=": (a, b) => a <= b, ">=": (a, b) => a >= b };

  function matches(row, word) {
    const parts = word.match(/^([a-z_]+)(<=|>=|=|<|>)(.+)$/);
    if (!parts || !row.fields.has(parts[1])) return row.dataset.fields.toLowerCase().includes(word);
    const [have, want] = [row.fields.get(parts[1]).toLowerCase(), parts[3]];
    if (want !== "" && !isNaN(have) && !isNaN(want)) return tests[parts[2]](Number(have), Number(want));
    return parts[2] === "=" && have.startsWith(want);
  }
  function filter() {
    const words = input.value.toLowerCase().trim().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      row.hidden = (fits.checked && row.dataset.fits === "0") || !words.every((word) => matches(row, word));
      shown += !row.hidden;
    }
    count.textContent = shown === rows.length ? `${shown} layouts` : `${shown} of ${rows.length} layouts`;
  }
  input.addEventListener("input", filter);
  fits.addEventListener("change", filter);
})();
