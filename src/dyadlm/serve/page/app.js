// The page: what is on it, and what its buttons do. Text of the model and names are only ever set as text.

import { Client } from "./client.js";
import { Future } from "./future.js";
import { Tower, drawBars, drawLines, shown, sized, table, thinned, timed } from "./pictures.js";

const EXAMPLE = `To be, or not to be, that is the question:
Whether 'tis nobler in the mind to suffer
The slings and arrows of outrageous fortune,
Or to take arms against a sea of troubles.
To be, or not to be, that is the question:`;
// Tokens that stand in the page at once; the rest is a move of the slider away.
const MOST_SHOWN = 3000, DROPPED = 500;
const MOST_READ = 100000; // characters
const STEPS = [1, 2, 4, 6, 8];

const at = (id) => document.getElementById(id);
const client = new Client(askForKey);
const tower = new Tower(at("tower"));

let models = [];
let future = null; // the text that is shown
let futures = []; // all of this tab
let here = -1; // the chosen token
let follows = true; // whether the newest token is the chosen one
let running = null; // an AbortController while the model reads or writes
let view = { from: 0, to: 0 }; // tokens that stand in the page
let pair = null; // the two futures that are compared
const owned = new Set(); // sessions that this tab made

// ---- Words

const bitsOf = (own) => (own.bits === null ? "first token" : `${own.bits.toFixed(2)} bits`);

function say(text) {
  at("status").textContent = text;
}

function complain(error) {
  at("error").hidden = !error;
  at("error").textContent = error ? `${error.message ?? error}` : "";
}

function count(number, what) {
  return `${number.toLocaleString("en")} ${what}${number === 1 ? "" : "s"}`;
}

// ---- Text

function span(event, index) {
  const part = document.createElement("span");
  const step = event.bits === null ? 0 : STEPS.filter((least) => event.bits >= least).length;
  part.className = `t s${step}${event.read ? "" : " written"}${event.text === "" ? " part" : ""}`;
  part.textContent = event.text;
  part.title = `${shown(event.name)} ${bitsOf(event)}`;
  part.dataset.index = index;
  return part;
}

function fillText() {
  const box = at("text");
  const middle = here < 0 ? future.length : here;
  const from = Math.max(0, Math.min(middle - MOST_SHOWN / 2, future.length - MOST_SHOWN));
  view = { from, to: Math.min(future.length, from + MOST_SHOWN) };
  box.replaceChildren();
  const hidden = document.createElement("span");
  hidden.className = "before";
  box.append(hidden);
  for (let i = view.from; i < view.to; i++) box.append(span(future.tokens[i], i));
  noteHidden();
}

function noteHidden() {
  const before = future.start + view.from;
  const tail = view.from ? "" : future.tail;
  at("text").firstChild.textContent = before ? `[${count(before, "earlier token")}] ${tail ? `… ${tail}` : ""}` : "";
}

function addText() {
  const box = at("text");
  if (view.to < here - MOST_SHOWN || box.childElementCount === 0) return fillText();
  const added = document.createDocumentFragment();
  for (let i = view.to; i < future.length; i++) added.append(span(future.tokens[i], i));
  view.to = future.length;
  box.append(added);
  if (view.to - view.from > MOST_SHOWN + DROPPED) {
    const drop = view.to - view.from - MOST_SHOWN;
    for (let i = 0; i < drop; i++) box.children[1].remove();
    view.from += drop;
    noteHidden();
  }
}

function node(index) {
  return index >= view.from && index < view.to ? at("text").children[1 + index - view.from] : null;
}

function markText() {
  for (const part of at("text").querySelectorAll(".here, .source")) part.classList.remove("here", "source");
  if (here < 0) return;
  if (here < view.from || here >= view.to) fillText();
  const chosen = node(here);
  chosen.classList.add("here");
  keepInSight(at("text"), chosen);
  const distances = future.tokens[here].slots.map((own) => own.distance).filter((own) => own !== null);
  if (distances.length) node(here + 1 - distances.at(-1))?.classList.add("source");
}

function keepInSight(box, part) {
  const above = part.offsetTop, below = above + part.offsetHeight;
  if (above < box.scrollTop || below > box.scrollTop + box.clientHeight) box.scrollTop = below - box.clientHeight + 12;
}

// From the token with number `from` on, where bits and known stood as told.
function summary(own, from = 0, bits = 0, known = 0) {
  const mean = (own.bits - bits) / Math.max(own.known - known, 1);
  return `${count(own.length - from, "token")}, mean surprise ${mean.toFixed(2)} bits a token`;
}

// ---- Everything that depends on the chosen moment

let drawing = 0, costsDrawn = 0;

function redraw() {
  drawing ||= requestAnimationFrame(() => {
    drawing = 0;
    draw();
  });
}

function draw() {
  if (!future) return;
  if (follows) here = future.length - 1;
  here = Math.min(here, future.length - 1);
  if (view.to < future.length && (follows || future.length < MOST_SHOWN)) addText();
  const own = future.tokens[here];
  markText();
  at("sum").textContent = future.length ? summary(future) : "";
  const time = at("time");
  time.max = Math.max(0, future.length - 1);
  time.value = Math.max(0, here);
  time.disabled = future.length === 0;
  const moment = own
    ? `Token ${here + 1} of ${future.length}: “${shown(own.name)}”, ${own.read ? "read" : "written by the model"}, ${bitsOf(own)}`
    : "Nothing has been read.";
  at("moment").textContent = moment;
  time.setAttribute("aria-valuetext", moment);
  drawNext(own);
  drawTower();
  drawSlots(own);
  drawCosts();
  enable();
}

function drawNext(own) {
  at("entropy").textContent = own
    ? `After “${shown(own.name)}”: ${own.entropy.toFixed(2)} bits of uncertainty (entropy)`
    : "Nothing has been read.";
  drawBars(at("bars"), own ? own.top : [], future.tokens[here + 1]?.name);
}

function drawTower() {
  const without = future.length > 0 && !future.tokens[0].levels.length;
  at("no-tower").hidden = !without;
  at("tower-box").hidden = without;
  const most = future.length ? tower.draw(future.tokens, here) : null;
  at("most").textContent = most === null ? "–" : most.toPrecision(2);
  if (!future.length) at("tower").getContext("2d").clearRect(0, 0, at("tower").width, at("tower").height);
  const own = future.tokens[here];
  if (own?.levels.length) {
    const strongest = own.levels.reduce((best, one) => (one.norm > best.norm ? one : best));
    at("tower").setAttribute(
      "aria-label",
      `Heat map of levels by tokens. At token ${here + 1} the level ${strongest.name} adds most, ${strongest.norm.toPrecision(2)}.`,
    );
  }
}

function drawSlots(own) {
  const none = future.length > 0 && !future.tokens[0].slots.length;
  at("no-slots").hidden = !none;
  at("slots").hidden = none;
  at("slots").tBodies[0].replaceChildren(...(own?.slots ?? []).map((one) => {
    const row = document.createElement("tr");
    const far = one.distance === null ? (one.hit ? "not known" : "–") : one.distance.toLocaleString("en");
    for (const text of [`${table(one.table)}${Number(one.table) ? " tokens" : ""}`, one.hit ? "yes" : "no", far]) {
      const cell = document.createElement("td");
      cell.textContent = text;
      row.append(cell);
    }
    row.classList.toggle("known", one.hit);
    return row;
  }));
}

function drawCosts() {
  // Of long texts some tokens stand for all, and while they come in, not at each of them.
  const now = performance.now();
  if (running && now - costsDrawn < 300) return;
  costsDrawn = now;
  const step = Math.ceil(future.length / 2000);
  const some = future.tokens.flatMap((own, i) => (i % step ? [] : [[i, own]]));
  const times = (read) => some.filter(([, own]) => own.read === read).map(([i, own]) => [i, own.ms]);
  const reading = times(true), writing = times(false);
  drawLines(at("ms"), [{ values: thinned(reading) }, { values: thinned(writing), second: true }], future.length, timed);
  const middle = (points) => points.map(([, ms]) => ms).sort((a, b) => a - b)[points.length >> 1];
  const told = [];
  if (reading.length) told.push(`reading ${timed(middle(reading))} (solid)`);
  if (writing.length) told.push(`writing ${timed(middle(writing))} (dashed)`);
  at("ms-title").textContent = told.length ? `Time of a token, median: ${told.join(", ")}` : "Time of a token";
  const sizes = some.map(([i, own]) => [i, own.state_bytes]).filter(([, bytes]) => bytes !== null);
  drawLines(at("bytes"), [{ values: thinned(sizes) }], future.length, sized);
  let title = "Size of the state";
  if (sizes.length) {
    const first = sizes[0][1], last = sizes.at(-1)[1];
    title += `: ${sized(last)}, ${first === last ? "as after the first token" : `${(last / first).toPrecision(2)} times that after the first token`}`;
  }
  at("bytes-title").textContent = title;
}

function enable() {
  const busy = running !== null, some = here >= 0;
  for (const id of ["do-read", "do-write", "new", "model", "both"]) at(id).disabled = busy || !future;
    at("stop").disabled = !busy;
  for (const id of ["fork", "compare"]) at(id).disabled = busy || !some;
  at("latest").disabled = !some || follows;
  at("save").disabled = busy || !(some || future?.start);
  for (const id of ["a-keep", "b-keep"]) at(id).disabled = busy || !pair?.written;
  for (const button of document.querySelectorAll("#saved button, #tabs button")) button.disabled = busy;
}

function choose(index, follow = false) {
  here = Math.max(0, Math.min(index, future.length - 1));
  follows = follow;
  redraw();
}

// ---- Reading and writing

function sampling() {
  const number = (id) => Number(at(id).value);
  const options = { temperature: number("temperature"), top_p: number("top-p"), top_k: number("top-k") };
  if (at("seed").value !== "") options.seed = number("seed");
  return options;
}

// Do something that takes time, one thing at once, which Stop ends.
async function during(what, work) {
  if (running || !future) return;
  running = new AbortController();
  const began = performance.now();
  complain(null);
  say(`${what} …`);
  enable();
  try {
    await work(running.signal);
    say(`${what}: done in ${((performance.now() - began) / 1000).toFixed(1)} s.`);
  } catch (error) {
    if (error.name === "AbortError") say(`${what}: stopped.`);
    else {
      say(`${what}: failed.`);
      complain(error);
    }
  } finally {
    running = null;
    await sweep();
    listTabs();
    redraw();
  }
}

async function go(what, request) {
  const own = future;
  follows = true;
  await during(what, (signal) => own.go(request, () => redraw(), signal));
}

async function read() {
  const text = at("read").value;
  if (!text) {
    say("Type or paste some text first.");
    at("read").focus();
    return;
  }
  if (text.length > MOST_READ) {
    complain(`The page reads at most ${MOST_READ.toLocaleString("en")} characters at once, since it keeps what it shows of each; give longer texts to the API (docs/watch.md, quiet).`);
    return;
  }
  const before = future.length;
  await go("Reading", { text });
  if (future.length > before && at("error").hidden) at("read").value = "";
}

const write = () => go("Writing", { max_tokens: Number(at("count").value), ...sampling() });

// ---- Futures

function show(other) {
  future = other;
  follows = true;
  here = other.length - 1;
  at("text").setAttribute("aria-label", `The text “${other.name}”, coloured by surprise`);
  fillText();
  listTabs();
  redraw();
}

function fresh() {
  const model = models.find((own) => own.id === at("model").value);
  const twin = new Future(client, model, { name: `Text ${futures.length + 1}` });
  futures.push(twin);
  at("savable").hidden = !model.sessions;
  closePair();
  show(twin);
}

// A future at the chosen moment; of an opened session also before its first token.
const forked = (name) => future.fork(here + 1, name);

async function fork() {
  const name = `${future.name} › ${here + 1}`;
  await during("Forking", async () => {
    const twin = await forked(name);
    futures.push(twin);
    show(twin);
  });
}

function openPair() {
  if (running || here < 0) return;
  pair = { from: future, at: here + 1, written: false };
  const tail = future.tokens.slice(Math.max(0, here - 39), here + 1).map((own) => own.text).join("");
  at("futures-from").textContent = `Both go on after token ${here + 1}: “…${tail}”. They differ in temperature and seed alone.`;
  for (const side of ["a", "b"]) {
    at(`${side}-text`).replaceChildren();
    at(`${side}-sum`).textContent = "";
  }
  at("futures").hidden = false;
  at("both").focus();
  enable();
}

function closePair() {
  pair = null;
  at("futures").hidden = true;
}

async function writeBoth() {
  const own = pair;
  await during("Writing two futures", async (signal) => {
    const request = { ...sampling(), max_tokens: Number(at("count").value) };
    const sides = ["a", "b"];
    own.sides = {};
    for (const side of sides) {
      at(`${side}-text`).replaceChildren();
      own.sides[side] = await own.from.fork(own.at, `${own.from.name} › ${own.at} ${side.toUpperCase()}`);
    }
    own.written = true;
    const done = await Promise.allSettled(sides.map((side) => {
      const twin = own.sides[side], box = at(`${side}-text`), before = [twin.length, twin.bits, twin.known];
      const asked = { ...request, temperature: Number(at(`${side}-temperature`).value), seed: Number(at(`${side}-seed`).value) };
      return twin.go(asked, (event) => {
        box.append(span(event, twin.length - 1));
        box.scrollTop = box.scrollHeight;
        at(`${side}-sum`).textContent = summary(twin, ...before);
      }, signal);
    }));
    const failed = done.find((one) => one.status === "rejected");
    if (failed) throw failed.reason;
  });
}

function keep(side) {
  const twin = pair.sides[side];
  futures.push(twin);
  closePair();
  show(twin);
  say(`Going on with “${twin.name}”.`);
  at("text").focus();
}

// ---- Sessions

function button(text, label, work) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = text;
  made.setAttribute("aria-label", label);
  made.addEventListener("click", work);
  return made;
}

function item(name, about, ...buttons) {
  const made = document.createElement("li"), what = document.createElement("span"), small = document.createElement("small");
  what.className = "what";
  what.textContent = name;
  small.textContent = about;
  what.append(small);
  made.append(what, ...buttons);
  return made;
}

function listTabs() {
  at("tabs").replaceChildren(...futures.map((own) => {
    const about = `${count(own.start + own.length, "token")}, ${own.model.id}`;
    const made = item(own.name, about);
    if (own === future) {
      made.querySelector(".what").classList.add("current");
      made.setAttribute("aria-current", "true");
    } else {
      made.append(button("Show", `Show ${own.name}`, () => { closePair(); show(own); }));
      made.append(button("Drop", `Drop ${own.name}`, async () => {
        futures = futures.filter((one) => one !== own);
        listTabs();
        await sweep();
      }));
    }
    return made;
  }));
}

async function listSaved() {
  const found = await client.sessions();
  const named = found.filter((own) => own.name);
  at("saved").replaceChildren(...named.map((own) => {
    const about = `${count(own.tokens, "token")}, ${sized(own.state_bytes)}, ${own.saved ? "saved" : "in memory"}, ${own.model}`;
    return item(
      own.name,
      about,
      button("Open", `Open ${own.name}`, () => open(own)),
      button("Delete", `Delete ${own.name}`, () => during("Deleting", async () => {
        await client.remove(own.id);
        await listSaved();
      })),
    );
  }));
  if (!named.length) at("saved").replaceChildren(item("None yet.", ""));
}

async function save(event) {
  event.preventDefault();
  const name = at("name").value;
  await during("Saving", async () => {
    const twin = await forked(name);
    const kept = await client.fork(twin.marks.at(-1).session, name);
    await client.save(kept.id);
    at("name").value = "";
    await listSaved();
  });
}

async function open(session) {
  await during("Opening", async () => {
    const model = models.find((own) => own.id === session.model);
    if (!model) throw new Error(`The model ${session.model} of this session is not served.`);
    const own = await client.fork(session.id); // the saved one stays as it is
    const marks = [{ at: 0, session: own.id }];
    const twin = new Future(client, model, { name: session.name, marks, start: session.tokens, tail: session.tail });
    at("model").value = model.id;
    futures.push(twin);
    closePair();
    show(twin);
  });
}

// Sessions that this tab made and needs no more are deleted.
async function sweep() {
  const compared = pair?.sides ? Object.values(pair.sides) : [];
  const used = new Set([...futures, ...compared].flatMap((own) => own.marks.map((mark) => mark.session)));
  for (const session of [...owned].filter((one) => !used.has(one))) {
    owned.delete(session);
    await client.remove(session).catch(() => {});
  }
}

for (const maker of ["create", "fork"]) {
  const make = client[maker].bind(client);
  client[maker] = async (from, name) => {
    const made = await make(from, name);
    if (!made.name) owned.add(made.id);
    return made;
  };
}

// ---- Key

function askForKey(refused) {
  const dialog = at("ask");
  at("ask-title").textContent = refused ? "The server does not know this key" : "This server asks for a key";
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      const key = at("key").value;
      at("key").value = "";
      at("forget").hidden = false;
      resolve(key);
    }, { once: true });
    dialog.addEventListener("cancel", (event) => event.preventDefault());
    dialog.showModal();
  });
}

// ---- Buttons and keys

const actions = {
  "do-read": read,
  "do-write": write,
  stop: () => running?.abort(),
  new: fresh,
  fork,
  compare: openPair,
  latest: () => choose(future.length - 1, true),
  both: writeBoth,
  close: closePair,
  "a-keep": () => keep("a"),
  "b-keep": () => keep("b"),
  keys: () => at("help").showModal(),
  forget: () => { client.key = null; location.reload(); },
};
for (const [id, work] of Object.entries(actions)) at(id).addEventListener("click", work);
at("save-form").addEventListener("submit", save);
at("model").addEventListener("change", fresh);
at("time").addEventListener("input", () => choose(Number(at("time").value), Number(at("time").value) === future.length - 1));
at("text").addEventListener("click", (event) => {
  const part = event.target.closest(".t");
  if (part) choose(Number(part.dataset.index));
});
at("text").addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!step || !future.length) return;
  event.preventDefault();
  choose(here + step, here + step >= future.length - 1);
});
at("tower").addEventListener("click", (event) => {
  const index = tower.token(event.offsetX);
  if (future.length && index >= 0 && index < future.length) choose(index);
});
for (const [id, is] of [["temperature", "temperature-is"], ["top-p", "top-p-is"]]) {
  const tell = () => { at(is).textContent = Number(at(id).value).toFixed(2); };
  at(id).addEventListener("input", tell);
  tell();
}
const letters = { w: "do-write", f: "fork", c: "compare", l: "latest", "?": "keys" };
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && event.target === at("read")) {
    event.preventDefault();
    at("do-read").click();
  } else if (event.key === "Escape" && running) {
    at("stop").click();
  } else if (at("single").checked && !event.ctrlKey && !event.metaKey && !event.altKey && !event.target.closest("input:not([type=range]), textarea, select, dialog")) {
    const id = letters[event.key.toLowerCase()];
    if (id && !at(id).disabled) {
      event.preventDefault();
      at(id).click();
    }
  }
});
window.addEventListener("resize", redraw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);

async function start() {
  at("read").value = EXAMPLE;
  at("forget").hidden = !client.key;
  models = await client.models();
  at("model").replaceChildren(...models.map((own) => {
    const option = document.createElement("option");
    option.value = own.id;
    option.textContent = own.parameters ? `${own.id} (${(own.parameters / 1e6).toPrecision(3)}M parameters)` : own.id;
    return option;
  }));
  fresh();
  if (models.some((own) => own.sessions)) await listSaved();
  say("Ready. Read the example, or give a text of your own.");
}

start().catch((error) => {
  say("The page could not be set up.");
  complain(error);
});
