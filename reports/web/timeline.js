// The step as a canvas: drag or swipe to move, pinch, Ctrl + wheel or keys to zoom.
(() => {
  const canvas = document.getElementById("timeline");
  const said = document.getElementById("window");
  const { tick, end, rows, kinds, names, pp } = data.timeline;
  const COLORS = { F: "blue", B: "orange", I: "yellow", W: "green", OVERLAP_F_B: "purple", OPTIMIZER: "dark", SEVERAL: "sky" };
  const WORDS = { F: "forward", B: "backward", I: "backward, input's gradient", W: "backward, weights' gradient", OVERLAP_F_B: "forward and backward together", OPTIMIZER: "optimizer", SEVERAL: "several ops" };
  const OTHER = { recv: ["grey", "waiting to receive"], send: ["sky", "sending"], dp: ["vermillion", "gradients and parameters"] };
  const LEAST = 40; // ticks: a millionth of a step is no more than a rounding

  // Flat numbers to columns: begins are sums of differences.
  const lanes = [];
  const many = rows.length * rows[0].sides.length > 24;
  let y = 26;
  for (const row of rows) {
    for (const side of row.sides) {
      const top = y;
      for (const lane of side.lanes) {
        if (many && (lane.stream === "send" || lane.stream === "recv")) continue;
        const tall = lane.stream === "compute" ? (many ? 14 : 22) : many ? 3 : 5;
        const spans = [];
        let at = 0, longest = 0;
        for (let n = 0; n < lane.spans.length; n += 5) {
          const [kind, stage, place, step, lasts] = lane.spans.slice(n, n + 5);
          at += step;
          longest = Math.max(longest, lasts);
          const name = stage < 0 ? names[place] : `PP:${stage}${kinds[kind]}${place < 0 ? "" : place}`;
          spans.push({ at, lasts, kind: kinds[kind], name, chunk: stage < 0 ? 0 : Math.floor(stage / pp) });
        }
        lanes.push({ y, tall, spans, longest, stream: lane.stream, side: side.side, rank: row.rank });
        y += tall + 1;
      }
      side.top = top;
      y += 4;
    }
    y += 6;
  }
  const tall = y + 2;
  const twoSides = rows[0].sides.length > 1;
  let view = [0, end];
  let left = 58;

  function limit(from, to) {
    const span = Math.min(Math.max(to - from, LEAST), end);
    const begin = Math.min(Math.max(from, 0), end - span);
    view = [begin, begin + span];
    draw();
  }
  function zoom(factor, middle = (view[0] + view[1]) / 2) {
    limit(middle - (middle - view[0]) * factor, middle + (view[1] - middle) * factor);
  }
  const move = (share) => limit(view[0] + share * (view[1] - view[0]), view[1] + share * (view[1] - view[0]));
  const timeAt = (x) => view[0] + ((x - left) / (canvas.clientWidth - left - 8)) * (view[1] - view[0]);

  // The first span that may reach into the view: begins are in order, none lasts longer than `longest`.
  function first(lane, from) {
    let [low, high] = [0, lane.spans.length];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (lane.spans[middle].at < from - lane.longest) low = middle + 1; else high = middle;
    }
    return low;
  }

  let asked = false;
  function draw() {
    if (asked) return;
    asked = true;
    requestAnimationFrame(() => { asked = false; drawNow(); });
  }
  function drawNow() {
    const wide = canvas.clientWidth;
    const ratio = devicePixelRatio || 1;
    left = twoSides ? 62 : 52;
    if (canvas.width !== Math.round(wide * ratio) || canvas.height !== Math.round(tall * ratio)) {
      canvas.width = Math.round(wide * ratio);
      canvas.height = Math.round(tall * ratio);
      canvas.style.height = `${tall}px`;
    }
    const pen = canvas.getContext("2d");
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, wide, tall);
    const [text, soft, line, page] = ["text", "soft", "line", "page"].map(color);
    const scale = (wide - left - 8) / (view[1] - view[0]);
    const shades = {};
    for (const name of new Set([...Object.values(COLORS), ...Object.values(OTHER).map((o) => o[0])])) shades[name] = color(name);

    pen.font = "11px system-ui, sans-serif";
    pen.textBaseline = "middle";
    pen.fillStyle = soft;
    pen.strokeStyle = line;
    const raw = ((view[1] - view[0]) * tick) / Math.max(2, (wide - left) / 110);
    const power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].find((s) => s * power >= raw) * power;
    for (let k = Math.ceil((view[0] * tick) / step); k * step <= view[1] * tick; k += 1) {
      const x = left + (k * step / tick - view[0]) * scale;
      pen.beginPath(); pen.moveTo(x, 20); pen.lineTo(x, tall); pen.stroke();
      pen.textAlign = x > wide - 40 ? "right" : "center";
      pen.fillText(seconds(Number((k * step).toPrecision(12))).replace(/(\.\d*?)0+ /, "$1 ").replace(". ", " "), x, 11);
    }

    pen.save();
    pen.beginPath(); pen.rect(left, 18, wide - left - 7, tall); pen.clip();
    pen.textAlign = "center";
    for (const lane of lanes) {
      const compute = lane.stream === "compute";
      for (let n = first(lane, view[0]); n < lane.spans.length && lane.spans[n].at <= view[1]; n += 1) {
        const span = lane.spans[n];
        const x = left + (span.at - view[0]) * scale;
        const w = span.lasts * scale;
        pen.globalAlpha = compute ? 1 - 0.5 * (span.chunk / Math.max(1, data.timeline.stages / pp)) : 0.75;
        pen.fillStyle = compute ? shades[COLORS[span.kind] || "grey"] : shades[OTHER[lane.stream][0]];
        pen.fillRect(x, lane.y, Math.max(w - (w > 4 ? 0.8 : 0), 0.4), lane.tall);
        const label = span.name.replace("PP:", "");
        if (compute && w > 7 * label.length + 4 && lane.tall > 12) {
          pen.globalAlpha = 1;
          const bright = ["F", "W", "OPTIMIZER"].includes(span.kind) && span.chunk < 2;
          pen.fillStyle = bright ? page : "#16181b";
          pen.fillText(label, Math.max(left, x) + (Math.min(x + w, wide) - Math.max(left, x)) / 2, lane.y + lane.tall / 2 + 0.5);
        }
      }
    }
    pen.restore();
    pen.globalAlpha = 1;
    pen.textAlign = "left";
    for (const row of rows) for (const side of row.sides) {
      pen.fillStyle = side.side === "predicted" ? text : soft;
      pen.fillText(`rank ${row.rank}`, 6, side.top + (many ? 7 : 11));
      if (twoSides) { pen.fillStyle = soft; pen.fillText(side.side, 6, side.top + (many ? 17 : 23)); }
    }
    // Where in the step the view is.
    pen.fillStyle = line; pen.fillRect(left, 0, wide - left - 8, 3);
    pen.fillStyle = soft; pen.fillRect(left + (view[0] / end) * (wide - left - 8), 0, Math.max(3, ((view[1] - view[0]) / end) * (wide - left - 8)), 3);
    canvas.dataset.from = String(view[0] * tick);
    canvas.dataset.to = String(view[1] * tick);
    said.textContent = `${seconds(view[0] * tick)} to ${seconds(view[1] * tick)}`;
  }

  function spanAt(x, yy) {
    const lane = lanes.find((one) => yy >= one.y - 1 && yy < one.y + one.tall + 1);
    if (!lane || x < left) return null;
    const slack = (view[1] - view[0]) / canvas.clientWidth;
    const at = timeAt(x);
    for (let n = first(lane, at); n < lane.spans.length && lane.spans[n].at <= at + slack; n += 1) {
      const span = lane.spans[n];
      if (span.at + span.lasts >= at - slack) return { lane, span };
    }
    return null;
  }
  function tell(event) {
    const box = canvas.getBoundingClientRect();
    const found = spanAt(event.clientX - box.left, event.clientY - box.top);
    if (!found) { hideTip(); return; }
    const { lane, span } = found;
    let text = `${span.name} (${lane.stream}, rank ${lane.rank}${twoSides ? `, ${lane.side}` : ""})\n${seconds(span.lasts * tick)} from ${seconds(span.at * tick)}`;
    const other = lanes.find((one) => one.rank === lane.rank && one.side !== lane.side && one.stream === lane.stream);
    const twin = other && other.spans.find((one) => one.name === span.name);
    if (twin) text += `\n${other.side}: ${seconds(twin.lasts * tick)} from ${seconds(twin.at * tick)}`;
    showTip(text, event.clientX, event.clientY);
  }

  const fingers = new Map();
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    fingers.set(event.pointerId, event.clientX);
    tell(event);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!fingers.has(event.pointerId)) { tell(event); return; }
    const box = canvas.getBoundingClientRect();
    const before = [...fingers.values()];
    fingers.set(event.pointerId, event.clientX);
    const after = [...fingers.values()];
    const perTick = (view[1] - view[0]) / (canvas.clientWidth - left - 8);
    if (after.length === 1) {
      if (after[0] !== before[0]) hideTip();
      limit(view[0] - (after[0] - before[0]) * perTick, view[1] - (after[0] - before[0]) * perTick);
    } else if (after.length === 2) {
      const [was, is] = [before, after].map(([a, b]) => Math.max(20, Math.abs(a - b)));
      zoom(was / is, timeAt((after[0] + after[1]) / 2 - box.left));
    }
  });
  for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, (event) => fingers.delete(event.pointerId));
  canvas.addEventListener("pointerleave", (event) => { if (!fingers.has(event.pointerId)) hideTip(); });
  canvas.addEventListener("wheel", (event) => {
    const middle = timeAt(event.clientX - canvas.getBoundingClientRect().left);
    if (event.ctrlKey || event.metaKey) { event.preventDefault(); zoom(1.0018 ** event.deltaY, middle); }
    else if (event.shiftKey || Math.abs(event.deltaX) > Math.abs(event.deltaY)) {
      event.preventDefault();
      move((event.deltaX || event.deltaY) / canvas.clientWidth);
    }
  }, { passive: false });
  canvas.addEventListener("dblclick", (event) => zoom(0.4, timeAt(event.clientX - canvas.getBoundingClientRect().left)));

  const doing = { in: () => zoom(0.5), out: () => zoom(2), left: () => move(-0.3), right: () => move(0.3), all: () => limit(0, end) };
  const keys = { "+": "in", "=": "in", "-": "out", ArrowLeft: "left", ArrowRight: "right", 0: "all", Home: "all" };
  canvas.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !keys[event.key]) return;
    event.preventDefault();
    doing[keys[event.key]]();
  });
  for (const button of document.querySelectorAll("[data-zoom]")) button.addEventListener("click", doing[button.dataset.zoom]);

  const legend = document.getElementById("timeline-legend");
  const key = (shade, word) => {
    const item = document.createElement("li");
    const mark = document.createElement("span");
    mark.style.background = `var(--${shade})`;
    item.append(mark, word);
    legend.append(item);
  };
  const seen = new Set(lanes.filter((l) => l.stream === "compute").flatMap((l) => l.spans.map((s) => s.kind)));
  for (const kind of Object.keys(COLORS)) if (seen.has(kind)) key(COLORS[kind], WORDS[kind]);
  for (const stream of Object.keys(OTHER)) if (lanes.some((l) => l.stream === stream)) key(...OTHER[stream]);

  document.addEventListener("repaint", draw);
  addEventListener("beforeprint", drawNow);
  new ResizeObserver(draw).observe(canvas);
  drawNow();
})();
