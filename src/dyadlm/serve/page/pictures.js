// Pictures of a text: the tower on a canvas, bars of probabilities, and lines of costs.

const LEFT = 86, FONT = "11px system-ui, 'DejaVu Sans', sans-serif", MONO = "12px ui-monospace, 'DejaVu Sans Mono', monospace";
const ROW = 17, GAP = 8, BELOW = 38;
const SVG = "http://www.w3.org/2000/svg";

// What stands for a token in a list: blanks are made visible.
export function shown(text) {
  return text === "" ? "·" : text.replaceAll(" ", "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll("\r", "␍");
}

export function sized(bytes) {
  if (bytes < 1000) return `${bytes} B`;
  return bytes < 1e6 ? `${(bytes / 1000).toFixed(1)} kB` : `${(bytes / 1e6).toFixed(2)} MB`;
}

export function level(name) {
  const window = Number(name.replaceAll(",", ""));
  return Number.isNaN(window) ? name : `${name} token${window === 1 ? "" : "s"}`;
}

export function table(name) {
  return name === "word" ? "open word" : Number.isNaN(Number(name)) ? name : `last ${name}`;
}

function colours(count) {
  const style = getComputedStyle(document.documentElement);
  const stops = [0, 1, 2, 3, 4].map((n) => rgb(style.getPropertyValue(`--heat-${n}`).trim()));
  const ramp = [];
  for (let i = 0; i < count; i++) {
    const at = (i / (count - 1)) * (stops.length - 1), low = Math.min(Math.floor(at), stops.length - 2);
    ramp.push(`rgb(${stops[low].map((own, c) => Math.round(own + (stops[low + 1][c] - own) * (at - low)))})`);
  }
  const named = (name) => style.getPropertyValue(name).trim();
  return { ramp, ink: named("--ink"), soft: named("--soft"), line: named("--line"), begin: named("--begin"), hit: named("--hit"), here: named("--accent") };
}

function rgb(hex) {
  return [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
}

// The tower: levels upwards, tokens to the right, the window around the chosen token. Returns how a place is read.
export class Tower {
  constructor(canvas) {
    this.canvas = canvas;
    this.first = 0;
    this.cell = 10;
  }

  // tokens: events. here: the chosen one. Returns the largest value in view, null where there is nothing to show.
  draw(tokens, here) {
    const levels = tokens[0]?.levels.map((own) => own.name) ?? [];
    if (!levels.length) return null;
    const tables = tokens[0].slots.map((own) => own.table);
    const wide = this.canvas.clientWidth, ratio = window.devicePixelRatio || 1;
    const high = levels.length * ROW + (tables.length ? GAP + tables.length * ROW : 0) + BELOW;
    this.canvas.width = Math.round(wide * ratio);
    this.canvas.height = Math.round(high * ratio);
    this.canvas.style.height = `${high}px`;
    const pen = this.canvas.getContext("2d"), colour = colours(64);
    pen.scale(ratio, ratio);
    const longest = tokens.slice(-200).reduce((most, own) => Math.max(most, shown(own.text).length), 1);
    this.cell = Math.max(11, 4 + 7.3 * Math.min(longest, 6));
    const count = Math.max(1, Math.floor((wide - LEFT - 2) / this.cell));
    this.first = Math.max(0, Math.min(here - Math.floor(count / 2), tokens.length - count));
    const seen = tokens.slice(this.first, this.first + count);
    const most = Math.max(1e-9, ...seen.map((own) => Math.max(...own.levels.map((one) => one.norm))));

    pen.font = FONT;
    pen.textBaseline = "middle";
    const line = (row) => (levels.length - 1 - row) * ROW;
    const slots = levels.length * ROW + GAP;
    pen.fillStyle = colour.ink;
    pen.textAlign = "right";
    levels.forEach((name, row) => pen.fillText(level(name), LEFT - 8, line(row) + ROW / 2));
    tables.forEach((name, row) => pen.fillText(table(name), LEFT - 8, slots + row * ROW + ROW / 2));
    seen.forEach((own, column) => {
      const x = LEFT + column * this.cell;
      own.levels.forEach((one, row) => {
        pen.fillStyle = colour.ramp[Math.round((63 * one.norm) / most)];
        pen.fillRect(x, line(row), this.cell, ROW);
        if (own.segments.includes(one.name)) {
          pen.fillStyle = colour.begin;
          pen.fillRect(x - 1, line(row), 2.5, ROW);
        }
      });
      own.slots.forEach((one, row) => {
        const y = slots + row * ROW;
        pen.fillStyle = one.hit ? colour.hit : colour.line;
        if (one.hit) pen.fillRect(x + 1, y + 3, this.cell - 2, ROW - 6);
        else pen.fillRect(x + this.cell / 2 - 1, y + ROW / 2 - 1, 2, 2);
      });
    });
    const bottom = high - BELOW;
    pen.strokeStyle = colour.here;
    pen.lineWidth = 2;
    pen.strokeRect(LEFT + (here - this.first) * this.cell, 1, this.cell, bottom - 2 + 18);
    pen.textAlign = "center";
    pen.font = MONO;
    pen.fillStyle = colour.ink;
    seen.forEach((own, column) => {
      const text = shown(own.text);
      pen.fillText(text.length > 6 ? `${text.slice(0, 5)}…` : text, LEFT + (column + 0.5) * this.cell, bottom + 9);
    });
    pen.font = FONT;
    pen.fillStyle = colour.soft;
    pen.textAlign = "left";
    const until = this.first + seen.length;
    pen.fillText(`tokens ${this.first + 1} to ${until} of ${tokens.length} →`, LEFT, high - 8);
    return most;
  }

  // The token at a place of the canvas, from its left edge.
  token(x) {
    return this.first + Math.floor((x - LEFT) / this.cell);
  }
}

// Bars of probabilities. came: the name of the token that came next, if one did.
export function drawBars(list, top, came) {
  list.replaceChildren(...top.map(([text, chance]) => {
    const item = document.createElement("li"), code = document.createElement("code");
    const bar = document.createElement("span"), share = document.createElement("span");
    code.textContent = shown(text);
    bar.className = "bar";
    bar.style.width = `${(100 * chance).toFixed(2)}%`;
    share.className = "share";
    share.textContent = chance < 0.0005 ? "< 0.1 %" : `${(100 * chance).toFixed(1)} %`;
    const area = document.createElement("span");
    area.append(bar);
    bar.style.display = "block";
    if (text === came) {
      item.className = "came";
      item.title = "This token came next.";
    }
    item.append(code, area, share);
    return item;
  }));
}

export function timed(ms) {
  return `${ms < 10 ? ms.toPrecision(2) : Math.round(ms)} ms`;
}

// Lines over so many tokens, from zero up. lines: [{values: [[token, value]], second}].
export function drawLines(svg, lines, tokens, write) {
  const wide = svg.clientWidth || 300, high = svg.clientHeight || 99, left = 58, below = 16, above = 6;
  svg.setAttribute("viewBox", `0 0 ${wide} ${high}`);
  svg.replaceChildren();
  const all = lines.flatMap((own) => own.values);
  if (!all.length) return;
  const last = Math.max(tokens - 1, 1), most = Math.max(...all.map(([, y]) => y)) * 1.1 || 1;
  const x = (token) => left + ((wide - left - 6) * token) / last;
  const y = (value) => high - below - ((high - below - above) * value) / most;
  const add = (kind, fields, text) => {
    const part = document.createElementNS(SVG, kind);
    for (const [name, value] of Object.entries(fields)) part.setAttribute(name, value);
    if (text !== undefined) part.textContent = text;
    svg.append(part);
  };
  for (const value of [0, most / 1.1]) {
    add("line", { class: "axis", x1: left, x2: wide - 6, y1: y(value), y2: y(value) });
    add("text", { x: left - 5, y: y(value) + 4, "text-anchor": "end" }, value ? write(value) : "0");
  }
  add("text", { x: left, y: high - 2 }, "first token");
  add("text", { x: wide - 6, y: high - 2, "text-anchor": "end" }, `token ${tokens}`);
  for (const { values, second } of lines) {
    const points = values.map(([token, value]) => `${x(token).toFixed(1)},${y(value).toFixed(1)}`);
    if (points.length) add("path", { d: `M${points.length > 1 ? points.join("L") : `${points[0]}h2`}`, class: second ? "second" : "" });
  }
}

// At most so many points: medians of equal pieces, each at its middle.
export function thinned(points, most = 80) {
  if (points.length <= most) return points;
  const found = [];
  for (let piece = 0; piece < most; piece++) {
    const part = points.slice(Math.floor((piece * points.length) / most), Math.floor(((piece + 1) * points.length) / most));
    const values = part.map(([, value]) => value).sort((a, b) => a - b);
    found.push([part[part.length >> 1][0], values[values.length >> 1]]);
  }
  return found;
}
