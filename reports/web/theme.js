"use strict";
// Colours, copying, tooltips and printing. Other scripts redraw on "repaint".
const data = JSON.parse(document.getElementById("data").textContent);
const tip = document.getElementById("tip");

function repaint() { document.dispatchEvent(new Event("repaint")); }

(() => {
  const buttons = [...document.querySelectorAll("[data-theme-choice]")];
  const choose = (theme) => {
    if (theme === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    for (const b of buttons) b.setAttribute("aria-pressed", String(b.dataset.themeChoice === theme));
    repaint();
  };
  let kept = "auto";
  // A page that was opened from disk may have no storage.
  try { kept = localStorage.getItem("layoutwise-theme") || "auto"; } catch { kept = "auto"; }
  for (const b of buttons) b.addEventListener("click", () => {
    choose(b.dataset.themeChoice);
    try { localStorage.setItem("layoutwise-theme", b.dataset.themeChoice); } catch { /* only this visit then */ }
  });
  choose(["light", "dark"].includes(kept) ? kept : "auto");
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);

  let before, opened;
  addEventListener("beforeprint", () => {
    before = document.documentElement.dataset.theme;
    document.documentElement.dataset.theme = "light";
    opened = [...document.querySelectorAll("details:not([open])")].filter((d) => d.textContent.length < 6000);
    for (const d of opened) d.open = true;
    repaint();
  });
  addEventListener("afterprint", () => {
    for (const d of opened || []) d.open = false;
    if (before) document.documentElement.dataset.theme = before; else delete document.documentElement.dataset.theme;
    repaint();
  });
})();

// What a colour of the style sheet is in the theme of the moment, for the canvas.
const probe = document.createElement("i");
probe.hidden = true;
document.body.append(probe);
function color(name) {
  probe.style.color = `var(--${name})`;
  return getComputedStyle(probe).color;
}

function showTip(text, x, y) {
  tip.textContent = text;
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  const wide = document.documentElement.clientWidth;
  tip.style.left = `${Math.max(4, Math.min(x + 12, wide - box.width - 4))}px`;
  tip.style.top = `${y + 18 + box.height > innerHeight ? y - box.height - 10 : y + 16}px`;
}
function hideTip() { tip.hidden = true; }

document.addEventListener("pointermove", (event) => {
  const target = event.target.closest ? event.target.closest("[data-tip]") : null;
  if (target) showTip(target.dataset.tip, event.clientX, event.clientY);
  else if (event.target.id !== "timeline") hideTip();
});
document.addEventListener("pointerdown", (event) => {
  const target = event.target.closest("[data-tip]");
  if (target) showTip(target.dataset.tip, event.clientX, event.clientY);
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape") hideTip(); });
addEventListener("scroll", hideTip, { passive: true });

document.addEventListener("click", async (event) => {
  const button = event.target.closest("[data-copy]");
  if (!button) return;
  let done = true;
  try {
    await navigator.clipboard.writeText(button.dataset.copy);
  } catch {
    // Browsers may keep the clipboard from pages on disk: select the text instead.
    const range = document.createRange();
    range.selectNodeContents(button.previousElementSibling);
    getSelection().removeAllRanges();
    getSelection().addRange(range);
    done = document.execCommand && document.execCommand("copy");
  }
  button.textContent = done ? "Copied" : "Selected";
  setTimeout(() => { button.textContent = "Copy"; }, 1500);
});

function seconds(value) {
  const size = Math.abs(value);
  if (size === 0) return "0 s";
  if (size >= 1) return `${value.toPrecision(4)} s`;
  if (size >= 1e-3) return `${(value * 1e3).toPrecision(4)} ms`;
  return `${(value * 1e6).toPrecision(3)} µs`;
}
