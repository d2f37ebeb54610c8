"use strict";

const NAMES = ["A", "B", "C", "D", "E"];
const UPDATES = ["before any update", "after 1 update", "after 2 updates", "after 3 updates"];
const byId = (id) => document.getElementById(id);
const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name);

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

// Returns a function that queries the server. If requests overlap, only the newest one's response counts.
function endpoint(path, status) {
  let latest = 0;
  const query = async (question, show, failed = () => {}) => {
    const number = ++latest;
    try {
      const began = performance.now();
      const response = await fetch(path, {
        method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(question),
      });
      const text = await response.text();
      if (number !== latest) return;
      if (!response.ok) throw new Error(text);
      show(JSON.parse(text), Math.round(performance.now() - began));
    } catch (error) {
      if (number !== latest) return;
      status.textContent = `Error: ${error.message}`;
      failed();
    }
  };
  query.cancel = () => { latest++; };
  return query;
}

// Redraws a canvas at the screen's resolution. `draw` gets the width and height in CSS pixels.
function sharp(canvas, draw) {
  const redraw = () => {
    const { clientWidth: width, clientHeight: height } = canvas, ratio = window.devicePixelRatio || 1;
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    const pen = canvas.getContext("2d");
    pen.scale(ratio, ratio);
    draw(pen, width, height);
  };
  new ResizeObserver(redraw).observe(canvas);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  return redraw;
}

function keys(canvas, undo, clear) {
  canvas.addEventListener("keydown", (event) => {
    if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "z") undo();
    else if (event.key === "Delete" || event.key === "Backspace") clear();
    else return;
    event.preventDefault();
  });
}

// -- characters ------------------------------------------------------------------------------------------------------

class Pad {
  constructor(name, changed) {
    this.strokes = [];
    this.changed = changed;
    this.canvas = element("canvas", { tabIndex: 0, id: `pad-${name}` });
    const title = name === "asked" ? "?" : name;
    this.canvas.setAttribute("role", "img");
    this.canvas.setAttribute("aria-label", name === "asked" ? "drawing to recognize" : `drawing of character ${name}`);
    const undo = () => this.change(() => this.strokes.pop());
    const clear = () => this.change(() => { this.strokes = []; });
    this.figure = element("figure", { className: name === "asked" ? "asked" : "" },
      element("figcaption", { textContent: title }), this.canvas,
      element("p", { className: "buttons" },
        element("button", { textContent: "Undo", onclick: undo, ariaLabel: `undo the last stroke of ${title}` }),
        element("button", { textContent: "Clear", onclick: clear, ariaLabel: `clear ${title}` })));
    this.redraw = sharp(this.canvas, (pen, width, height) => this.draw(pen, width, height));
    keys(this.canvas, undo, clear);
    let stroke = null, pointer; // of the finger or pen that draws, so that a resting palm draws nothing
    this.canvas.addEventListener("pointerdown", (event) => {
      if (event.button !== 0 || stroke) return;
      pointer = event.pointerId;
      this.canvas.setPointerCapture(pointer);
      stroke = [this.place(event)];
      this.strokes.push(stroke);
      this.redraw();
    });
    this.canvas.addEventListener("pointermove", (event) => {
      if (!stroke || event.pointerId !== pointer) return;
      for (const part of event.getCoalescedEvents?.() ?? [event]) stroke.push(this.place(part));
      this.redraw();
    });
    for (const end of ["pointerup", "pointercancel"]) {
      this.canvas.addEventListener(end, (event) => {
        if (!stroke || event.pointerId !== pointer) return;
        stroke = null;
        this.changed();
      });
    }
  }

  place(event) {
    const box = this.canvas.getBoundingClientRect();
    const inside = (value) => Math.min(1, Math.max(0, Math.round(10000 * value) / 10000));
    return [inside((event.clientX - box.left) / box.width), inside((event.clientY - box.top) / box.height)];
  }

  change(how) {
    how();
    this.redraw();
    this.changed();
  }

  draw(pen, width, height) {
    pen.strokeStyle = pen.fillStyle = color("--ink");
    pen.lineWidth = width / 24;
    pen.lineCap = pen.lineJoin = "round";
    for (const stroke of this.strokes) {
      pen.beginPath();
      for (const [x, y] of stroke) pen.lineTo(x * width, y * height);
      if (stroke.length === 1) pen.lineTo(stroke[0][0] * width + 0.1, stroke[0][1] * height);
      pen.stroke();
    }
  }
}

function characters() {
  const status = byId("characters-status"), query = endpoint("/characters", status);
  const pads = [...NAMES, "asked"].map((name) => new Pad(name, changed));
  byId("pads").append(...pads.map((pad) => pad.figure));

  function changed() {
    query.cancel();
    byId("answers").replaceChildren();
    const missing = [...NAMES, "?"].filter((_, i) => !pads[i].strokes.length);
    if (missing.length) {
      status.textContent = `Still to draw: ${missing.join(", ")}.`;
      return;
    }
    status.textContent = "Running the model.";
    const drawings = pads.map((pad) => pad.strokes);
    query({ labelled: drawings.slice(0, 5), asked: drawings[5] }, show);
  }

  function show({ probabilities }, milliseconds) {
    const last = probabilities.at(-1), best = last.indexOf(Math.max(...last));
    status.textContent = `This is ${NAMES[best]}, with probability ${last[best].toFixed(2)} (${milliseconds} ms).`;
    byId("answers").replaceChildren(...probabilities.map((row, update) => element("div", { className: "update" },
      element("h3", { textContent: UPDATES[update] }),
      ...row.map((p, i) => {
        const bar = element("span");
        bar.innerHTML = `<svg viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true"><rect class="track"
          width="100" height="10"/><rect class="bar" width="${(100 * p).toFixed(2)}" height="10"/></svg>`;
        return element("div", { className: p === Math.max(...row) ? "row best" : "row" },
          element("span", { textContent: NAMES[i] }), bar, element("span", { textContent: p.toFixed(3) }));
      }))));
  }
}

// -- the sinusoid ----------------------------------------------------------------------------------------------------

const X = 5, Y = 6; // the plot shows -X to X and -Y to Y
const LINES = [["0", "--before", [2, 4]], ["1", "--one", [7, 4]], ["10", "--ten", []]];

function sinusoid() {
  const status = byId("sinusoid-status"), query = endpoint("/sinusoid", status);
  let points = [], answer = null;
  const cross = { x: 0, y: 0, shown: false };
  const redraws = ["MAML", "Pretrained"].map(plot);

  function plot(label) {
    const canvas = element("canvas", { tabIndex: 0, id: `plot-${label}` });
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `${label}: curves through the points`);
    byId("plots").append(element("figure", {}, element("figcaption", { textContent: label }), canvas));
    const redraw = sharp(canvas, (pen, width, height) => {
      const at = (x, y) => [(x + X) / (2 * X) * width, (Y - y) / (2 * Y) * height];
      const line = (places) => { pen.beginPath(); places.forEach((p) => pen.lineTo(...p)); pen.stroke(); };
      pen.strokeStyle = color("--line");
      line([at(-X, 0), at(X, 0)]);
      line([at(0, -Y), at(0, Y)]);
      pen.fillStyle = color("--soft");
      pen.font = "11px system-ui, sans-serif";
      for (const y of [-4, -2, 2, 4]) pen.fillText(y, at(0, y)[0] + 4, at(0, y)[1] + 4);
      for (const x of [-4, -2, 2, 4]) pen.fillText(x, at(x, 0)[0] - 4, at(x, 0)[1] + 14);
      for (const [updates, name, dashes] of answer ? LINES : []) {
        pen.strokeStyle = color(name);
        pen.lineWidth = 2.5;
        pen.setLineDash(dashes);
        line(answer.x.map((x, i) => at(x, answer.curves[label][updates][i])));
      }
      pen.setLineDash([]);
      pen.fillStyle = color("--ink");
      for (const [x, y] of points) { pen.beginPath(); pen.arc(...at(x, y), 4.5, 0, 7); pen.fill(); }
      if (cross.shown && document.activeElement === canvas) {
        pen.strokeStyle = color("--best");
        pen.lineWidth = 1.5;
        const [x, y] = at(cross.x, cross.y);
        line([[x - 9, y], [x + 9, y]]);
        line([[x, y - 9], [x, y + 9]]);
      }
    });
    canvas.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      const box = canvas.getBoundingClientRect();
      add((event.clientX - box.left) / box.width * 2 * X - X, Y - (event.clientY - box.top) / box.height * 2 * Y);
    });
    canvas.addEventListener("keydown", (event) => {
      const moves = { ArrowLeft: [-0.25, 0], ArrowRight: [0.25, 0], ArrowUp: [0, 0.25], ArrowDown: [0, -0.25] };
      if (event.key === "Enter") add(cross.x, cross.y);
      else if (moves[event.key]) {
        cross.x = Math.max(-X, Math.min(X, cross.x + moves[event.key][0]));
        cross.y = Math.max(-Y, Math.min(Y, cross.y + moves[event.key][1]));
        cross.shown = true;
        redraw();
      } else return;
      event.preventDefault();
    });
    keys(canvas, undo, clear);
    return redraw;
  }

  function add(x, y) { if (points.length < 50) change([...points, [x, y]]); }
  function undo() { change(points.slice(0, -1)); }
  function clear() { change([]); }

  function change(now) {
    points = now;
    query.cancel();
    if (!points.length) answer = null;
    redraws.forEach((redraw) => redraw());
    if (!points.length) {
      status.textContent = "No points yet.";
      return;
    }
    status.textContent = "Running the models.";
    query({ points }, (fit, milliseconds) => {
      answer = fit;
      const noun = points.length === 1 ? "1 point" : `${points.length} points`;
      status.textContent = `Fitted to ${noun} (${milliseconds} ms).`;
      redraws.forEach((redraw) => redraw());
    }, () => {
      answer = null; // its curves fit other points
      redraws.forEach((redraw) => redraw());
    });
  }

  byId("sine-undo").onclick = undo;
  byId("sine-clear").onclick = clear;
  byId("sine-example").onclick = () =>
    change([-4.2, -3, -1.8, -0.5, 0.9].map((x) => [x, 3.2 * Math.sin(x - 1.1)]));
}

characters();
sinusoid();
