// Curves and scatters as SVG at the width that there is, so that words keep their size on a phone.
(() => {
  const make = (name, attributes, text) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const show = (value) => {
    const size = Math.abs(value);
    if (size >= 1e9) return `${+(value / 1e9).toPrecision(3)} G`;
    if (size >= 1e6) return `${+(value / 1e6).toPrecision(3)} M`;
    if (size >= 1e4) return `${+(value / 1e3).toPrecision(3)} k`;
    return String(+value.toPrecision(3));
  };

  // Round numbers: 1, 2, 5 times a power of ten; on a logarithmic axis powers of ten (or of two between them).
  function ticks(low, high, log, many, xs) {
    if (log && xs && xs.length <= 8) return xs;
    if (log) {
      const found = [];
      const steps = Math.log10(high / low) > 2.2 ? [1] : Math.log10(high / low) > 1 ? [1, 3] : [1, 1.5, 2, 3, 5, 7];
      for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e += 1)
        for (const s of steps) if (s * 10 ** e >= low * 0.999 && s * 10 ** e <= high * 1.001) found.push(s * 10 ** e);
      if (found.length > 1) return found;
    }
    const raw = (high - low) / many;
    const power = 10 ** Math.floor(Math.log10(raw || 1));
    const step = [1, 2, 5, 10].find((s) => s * power >= raw) * power;
    const found = [];
    for (let k = Math.ceil(low / step - 1e-9); k * step <= high * (1 + 1e-9); k += 1) found.push(k * step);
    return found;
  }

  function range(chart, key) {
    const at = key === "x" ? 0 : 1;
    const values = chart.series.flatMap((s) => s.points.flatMap((p) => (at ? [p[1], p[2], p[3]] : [p[0]])).filter((v) => v !== null));
    if (at) for (const level of chart.levels || []) values.push(level.y);
    if (chart.diagonals) values.push(...chart.series.flatMap((s) => s.points.flatMap((p) => [p[0], p[1]])));
    let [low, high] = [Math.min(...values), Math.max(...values)];
    if (chart[key].log) return [low / 1.12, high * 1.12];
    if (chart[key].zero) low = Math.min(0, low);
    const pad = (high - low || Math.abs(high) || 1) * 0.04;
    return [chart[key].zero || (key === "x" && low === 0) ? low : low - pad, high + pad];
  }

  function draw(plot) {
    const chart = data.charts[plot.dataset.chart];
    const wide = Math.max(240, plot.clientWidth);
    const square = Boolean(chart.diagonals);
    const tall = Math.round(square ? Math.min(wide, 560) : Math.max(210, Math.min(340, wide * 0.5)));
    const box = { left: 52, right: wide - 12, top: 14, bottom: tall - 40 };
    if (square) box.right = Math.min(box.right, box.left + box.bottom - box.top);
    const place = {};
    const [X, Y] = ["x", "y"].map((key) => {
      const [low, high] = (place[key] = range(chart, key));
      const f = chart[key].log ? Math.log : (v) => v;
      const [from, to] = key === "x" ? [box.left, box.right] : [box.bottom, box.top];
      return (v) => from + ((f(v) - f(low)) / (f(high) - f(low))) * (to - from);
    });
    const svg = make("svg", { viewBox: `0 0 ${wide} ${tall}`, height: tall, role: "img", "aria-label": `${chart.title}: ${chart.y.label} over ${chart.x.label}` });
    const xs = [...new Set(chart.series.flatMap((s) => s.points.map((p) => p[0])))].sort((a, b) => a - b);
    for (const v of ticks(...place.x, chart.x.log, wide / 110, xs)) {
      svg.append(make("line", { class: "grid", x1: X(v), x2: X(v), y1: box.top, y2: box.bottom }));
      svg.append(make("text", { x: X(v), y: box.bottom + 16, "text-anchor": "middle" }, show(v)));
    }
    for (const v of ticks(...place.y, chart.y.log, 5)) {
      svg.append(make("line", { class: "grid", x1: box.left, x2: box.right, y1: Y(v), y2: Y(v) }));
      svg.append(make("text", { x: box.left - 7, y: Y(v) + 4, "text-anchor": "end" }, show(v)));
    }
    svg.append(make("text", { x: (box.left + box.right) / 2, y: tall - 6, "text-anchor": "middle" }, chart.x.label));
    svg.append(make("text", { x: box.left - 44, y: 9 }, chart.y.label));
    const [low, high] = place.x;
    for (const factor of chart.diagonals || []) {
      const [from, to] = [Math.max(low, low / factor), Math.min(high, high / factor)];
      svg.append(make("line", { class: factor === 1 ? "guide whole" : "guide", x1: X(from), x2: X(to), y1: Y(from * factor), y2: Y(to * factor) }));
    }
    for (const series of chart.series) drawSeries(svg, chart, series, X, Y);
    for (const level of chart.levels || []) {
      svg.append(make("line", { class: "guide", x1: box.left, x2: box.right, y1: Y(level.y), y2: Y(level.y) }));
      svg.append(make("text", { x: box.right, y: Y(level.y) - 5, "text-anchor": "end" }, `${level.label} ${show(level.y)}`));
    }
    plot.replaceChildren(svg, ...keys(chart));
  }

  function drawSeries(svg, chart, series, X, Y) {
    const group = make("g", { class: `c${series.color}` });
    const at = (v, scale) => scale(v).toFixed(1);
    if (series.kind === "line") {
      const path = series.points.map(([x, y]) => `${at(x, X)},${at(y, Y)}`).join("L");
      group.append(make("path", { class: "curve", d: `M${path}`, ...(series.color === 7 ? { "stroke-dasharray": "3 4" } : {}) }));
    }
    if (series.kind === "area") {
      // Steps: along the upper edge to the right, back along the lower one.
      const [first, ...rest] = series.points;
      const last = series.points[series.points.length - 1];
      const up = rest.map(([x, y]) => `H${at(x, X)}V${at(y, Y)}`).join("");
      const down = series.points.slice(0, -1).reverse().map(([x, , low]) => `V${at(low, Y)}H${at(x, X)}`).join("");
      group.append(make("path", { class: "area", d: `M${at(first[0], X)},${at(first[1], Y)}${up}V${at(last[2], Y)}${down}Z` }));
      svg.append(group);
      return;
    }
    const strong = chart.groups ? new Set(chart.groups.find((g) => g.name === chart.group).points) : null;
    const order = series.points.map((_, n) => n);
    if (strong) order.sort((a, b) => strong.has(a) - strong.has(b));
    for (const n of order) {
      const [x, y, bottom, top, text] = series.points[n];
      if (bottom !== null) group.append(make("path", { class: "whiskers", d: `M${X(x) - 4},${Y(top)}h8M${X(x)},${Y(top)}V${Y(bottom)}M${X(x) - 4},${Y(bottom)}h8` }));
      if (series.kind === "points" || text) {
        const faint = strong && !strong.has(n);
        const tipText = strong ? `${text}\nmeasured ${show(x)}, predicted ${show(y)}` : text;
        group.append(make("circle", { cx: X(x).toFixed(1), cy: Y(y).toFixed(1), r: strong ? (faint ? 2 : 2.8) : 4, ...(faint ? { class: "faint c7" } : strong ? { class: "many" } : {}), ...(text ? { "data-tip": tipText } : {}) }));
        if (series.named) svg.append(make("text", { x: X(x) - 3, y: Y(y) - 9 }, text.split(":")[0]));
      }
    }
    svg.append(group);
  }

  function keys(chart) {
    if (chart.series.length < 2) return [];
    const list = document.createElement("ul");
    list.className = "legend";
    for (const series of chart.series) {
      const item = document.createElement("li");
      const mark = document.createElement("span");
      mark.className = `key c${series.color}`;
      item.append(mark, series.name);
      list.append(item);
    }
    return [list];
  }

  const plots = [...document.querySelectorAll("[data-chart]")];
  const all = () => plots.forEach(draw);
  let width = 0;
  new ResizeObserver(() => {
    if (document.body.clientWidth !== width) { width = document.body.clientWidth; all(); }
  }).observe(document.body);
  addEventListener("beforeprint", all);
  all();

  const parity = data.charts.parity;
  if (!parity) return;
  const select = document.getElementById("group");
  const text = document.getElementById("group-text");
  const percent = (value) => `${value < 0 ? "−" : "+"}${Math.abs(100 * value).toFixed(1)} %`;
  select.append(...parity.groups.map((g) => new Option(`${g.name} (${g.count})`, g.name, false, g.name === parity.group)));
  const choose = () => {
    parity.group = select.value;
    const g = parity.groups.find((one) => one.name === select.value);
    text.textContent = `${g.count} runs, median error ${(100 * g.median_abs).toFixed(1)} % in size, four of five from ${percent(g.p10)} to ${percent(g.p90)}`;
    draw(plots.find((plot) => plot.dataset.chart === "parity"));
  };
  select.addEventListener("change", choose);
  choose();
})();
