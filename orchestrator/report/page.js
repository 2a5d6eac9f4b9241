"use strict";

// Column headings sort their table; empty cells stay last.
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const header = button.closest("th"), body = header.closest("table").tBodies[0];
    const sign = header.ariaSort === "ascending" ? -1 : 1;
    for (const other of header.parentElement.cells) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    const key = (row) => row.cells[header.cellIndex].dataset.value ?? row.cells[header.cellIndex].textContent.trim();
    const compare = (a, b) => a - b || (isNaN(a - b) ? a.localeCompare(b) : 0);
    const rows = [...body.rows].sort((one, two) => {
      const a = key(one), b = key(two);
      return a === "" || b === "" ? (a === "") - (b === "") : sign * compare(a, b);
    });
    body.append(...rows);
  });
}

const explorer = document.getElementById("explorer");
if (explorer) explore(explorer, JSON.parse(document.getElementById("points").textContent));

// A scatter of all results: any measure over any other, hover for the settings, click for the replies.
function explore(place, points) {
  const canvas = place.querySelector("canvas"), tip = place.querySelector(".tip");
  const [across, up] = place.querySelectorAll("select");
  const picked = place.querySelector("output"), said = place.querySelector(".said");
  const front = new Set(points.front), near = new Set(points.near);
  const margin = { left: 72, right: 16, top: 12, bottom: 44 };
  const REACH = 14;
  let shown = [], scales = null, hovered = -1, chosen = -1;

  for (const [number, select] of [across, up].entries()) {
    for (const [index, column] of points.columns.entries()) select.add(new Option(column.name, index));
    select.selectedIndex = points.axes[number];
    select.addEventListener("change", draw);
  }
  place.hidden = false;

  const number = (value) => {
    if (value === null) return "–";
    const size = Math.abs(value);
    const text = value === 0 || (size >= 1e-3 && size < 1e4) ? String(+value.toFixed(3)) : value.toPrecision(3);
    return text.replace("-", "−");
  };
  const setting = (value) => (typeof value === "number" ? String(+value.toPrecision(6)).replace("-", "−") : value ?? "–");
  const settings = (index) =>
    Object.entries(points.settings).map(([name, values]) => `${name} ${setting(values[index])}`).join(", ");
  const standing = (index) => (front.has(index) ? ", on the front" : near.has(index) ? ", nearly on the front" : "");
  const measured = (column, index) => `${column.name} ${number(column.values[index])}`;

  function ticks(low, high, most) {
    const rough = (high - low) / most, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((each) => each * power).find((each) => each >= rough);
    const found = [];
    for (let tick = Math.ceil(low / step); tick * step <= high * (1 + 1e-12); tick++) found.push(tick * step);
    return found;
  }

  function range(values) {
    let low = Infinity, high = -Infinity;
    for (const value of values) { low = Math.min(low, value); high = Math.max(high, value); }
    const pad = (high - low || Math.abs(high) || 1) * 0.05;
    return [low - pad, high + pad];
  }

  function draw() {
    const [xs, ys] = [across, up].map((select) => points.columns[select.value].values);
    shown = points.trials.map((_, index) => index).filter((index) => xs[index] !== null && ys[index] !== null);
    const ratio = window.devicePixelRatio || 1, width = canvas.clientWidth, height = canvas.clientHeight;
    canvas.width = width * ratio;
    canvas.height = height * ratio;
    const [xRange, yRange] = [xs, ys].map((values) => range(shown.map((index) => values[index])));
    const x = (value) => margin.left + ((value - xRange[0]) / (xRange[1] - xRange[0])) * (width - margin.left - margin.right);
    const y = (value) => height - margin.bottom - ((value - yRange[0]) / (yRange[1] - yRange[0])) * (height - margin.top - margin.bottom);
    scales = { at: (index) => [x(xs[index]), y(ys[index])], xs };
    const style = getComputedStyle(place), colour = (name) => style.getPropertyValue(name).trim();
    const pen = canvas.getContext("2d");
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, width, height);
    pen.font = `12px ${style.fontFamily}`;
    pen.fillStyle = colour("--quiet");
    pen.strokeStyle = colour("--line");
    pen.beginPath();
    pen.textAlign = "center";
    for (const tick of shown.length ? ticks(...xRange, Math.max(2, width / 110)) : []) {
      pen.moveTo(x(tick), margin.top); pen.lineTo(x(tick), height - margin.bottom);
      pen.fillText(number(tick), x(tick), height - margin.bottom + 16);
    }
    pen.textAlign = "right";
    for (const tick of shown.length ? ticks(...yRange, Math.max(2, height / 60)) : []) {
      pen.moveTo(margin.left, y(tick)); pen.lineTo(width - margin.right, y(tick));
      pen.fillText(number(tick), margin.left - 8, y(tick) + 4);
    }
    pen.stroke();
    pen.fillStyle = colour("--ink");
    pen.textAlign = "center";
    pen.fillText(points.columns[across.value].label, (margin.left + width - margin.right) / 2, height - 8);
    pen.save();
    pen.translate(14, (margin.top + height - margin.bottom) / 2);
    pen.rotate(-Math.PI / 2);
    pen.fillText(points.columns[up.value].label, 0, 0);
    pen.restore();
    if (!shown.length) pen.fillText("No result has both.", width / 2, height / 2);
    const dots = (which, size, name, opacity) => {
      pen.globalAlpha = opacity;
      pen.fillStyle = colour(name);
      for (const index of shown) {
        if (!which(index)) continue;
        pen.beginPath(); pen.arc(...scales.at(index), size, 0, 2 * Math.PI); pen.fill();
      }
      pen.globalAlpha = 1;
    };
    dots((index) => !front.has(index), points.trials.length > 3000 ? 2 : 3.5, "--quiet", 0.45);
    dots((index) => front.has(index), 5, "--accent", 1);
    for (const [index, thick] of [[hovered, 1.5], [chosen, 3]]) {
      if (index < 0 || xs[index] === null || ys[index] === null) continue;
      pen.strokeStyle = colour("--ink");
      pen.lineWidth = thick;
      pen.beginPath(); pen.arc(...scales.at(index), 8, 0, 2 * Math.PI); pen.stroke();
      pen.lineWidth = 1;
    }
  }

  function nearest(event) {
    const box = canvas.getBoundingClientRect();
    let best = -1, least = REACH * REACH;
    for (const index of shown) {
      const [x, y] = scales.at(index);
      const distance = (x - event.clientX + box.left) ** 2 + (y - event.clientY + box.top) ** 2;
      // Of results at the same place the one on the front is meant.
      if (distance < least || (distance === least && front.has(index))) [best, least] = [index, distance];
    }
    return best;
  }

  function point(index) {
    if (index !== hovered) {
      hovered = index;
      draw();
    }
    tip.hidden = index < 0;
    canvas.style.cursor = index < 0 ? "default" : "pointer";
    if (index < 0) return;
    const lines = [
      `Trial ${points.trials[index]}${standing(index)}`, settings(index),
      ...points.columns.filter((column) => column.is_objective).map((column) => measured(column, index)),
    ];
    tip.replaceChildren(...lines.map((line) => Object.assign(document.createElement("div"), { textContent: line })));
    const [x, y] = scales.at(index), left = x + 14 + tip.offsetWidth > canvas.clientWidth ? x - 14 - tip.offsetWidth : x + 14;
    tip.style.left = `${Math.max(0, left)}px`;
    tip.style.top = `${Math.max(0, y - tip.offsetHeight - 8)}px`;
  }

  function cell(row, kind, text, label) {
    const found = row.appendChild(document.createElement(kind));
    if (label) found.dataset.label = label;
    const span = found.appendChild(document.createElement(text ? "span" : "em"));
    span.textContent = text === null ? "not stored" : text || "empty reply";
    if (text) Object.assign(span, { className: "text", dir: "auto" });
    return found;
  }

  function choose(index) {
    chosen = index;
    draw();
    said.replaceChildren();
    picked.textContent = "";
    if (index < 0) return;
    const values = points.columns.filter((column) => column.is_measure).map((column) => measured(column, index));
    picked.textContent = `Trial ${points.trials[index]}${standing(index)}: ${settings(index)}. ${values.join(", ")}.`;
    const replies = points.replies[points.trials[index]];
    if (!replies) {
      const note = said.appendChild(document.createElement("p"));
      note.textContent = points.has_replies
        ? `Its replies are too many for this page: steersweep show DIR ${points.trials[index]} prints them.`
        : "No replies are stored.";
      return;
    }
    const table = said.appendChild(document.createElement("table"));
    table.className = "replies";
    const headings = ["prompt", ...points.beside, points.tried];
    const row = table.createTHead().insertRow();
    for (const text of headings) Object.assign(row.appendChild(document.createElement("th")), { scope: "col", textContent: text });
    const body = table.createTBody();
    for (const [split, prompt, ...texts] of replies) {
      const line = body.insertRow();
      const first = cell(line, "th", points.texts[prompt]);
      first.scope = "row";
      Object.assign(first.appendChild(document.createElement("span")), { className: "split", textContent: split });
      for (const [place, text] of texts.entries()) cell(line, "td", text === null ? null : points.texts[text], headings[place + 1]);
    }
  }

  function step(by) {
    const from = chosen >= 0 ? chosen : hovered;
    const order = [...shown].sort((one, two) => scales.xs[one] - scales.xs[two] || one - two);
    const line = Math.abs(by) === 1 ? order : order.filter((index) => front.has(index));
    const here = line.indexOf(from), sign = Math.sign(by);
    const next = here < 0 ? (sign > 0 ? 0 : line.length - 1) : Math.min(line.length - 1, Math.max(0, here + sign));
    if (line.length) { point(line[next]); choose(line[next]); }
  }

  const KEYS = { ArrowRight: 1, ArrowLeft: -1, ArrowUp: 2, ArrowDown: -2 };
  canvas.addEventListener("pointermove", (event) => point(nearest(event)));
  canvas.addEventListener("pointerleave", () => point(-1));
  canvas.addEventListener("click", (event) => choose(nearest(event)));
  canvas.addEventListener("keydown", (event) => {
    if (event.key === "Escape") { point(-1); choose(-1); }
    if (!(event.key in KEYS)) return;
    event.preventDefault();
    step(KEYS[event.key]);
  });
  new ResizeObserver(draw).observe(canvas);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
}
