// Shows the exporter's server-sent events.  The page sends nothing.
// Texts come from workers and may be hostile: they are inserted only as text.
"use strict";

const STEPS = 120, SILENT_S = 20, DENSE = 24, TROUBLES = 40;
const $ = (id) => document.getElementById(id);
const instances = new Map(); // id -> {data, card, points: Map of step -> [rate, active, p99], lanes}
let offset = 0, version = null, opened = null, source = null, step = 0, filter = "", frozen = null;
let heard = 0, patience_s = SILENT_S;

// -- words ---------------------------------------------------------------------

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const fine = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });
const number = (n) => (n == null ? "–" : n < 10 ? fine.format(n) : whole.format(n));
/** Waits are counted in ranges: show the upper end.  The last range has none. */
function wait(us) {
  if (us == null) return "–";
  if (us >= 2 ** 31 - 1) return "> 1,073 s";
  if (us < 1000) return `≤ ${whole.format(us)} µs`;
  if (us < 1e6) return `≤ ${us < 1e4 ? fine.format(us / 1e3) : whole.format(us / 1e3)} ms`;
  return `≤ ${us < 1e7 ? fine.format(us / 1e6) : whole.format(us / 1e6)} s`;
}
function span(s) {
  s = Math.max(0, Math.floor(s));
  if (s < 100) return `${s} s`;
  if (s < 6000) return `${Math.floor(s / 60)} min`;
  if (s < 172800) return `${Math.floor(s / 3600)} h`;
  return `${Math.floor(s / 86400)} d`;
}
const now = () => Date.now() / 1000 - offset;
/** Return a Date; null for an unknown time, or after the year 275760, where JavaScript's dates end. */
function date(at) {
  const found = new Date((at + offset) * 1000);
  return at == null || Number.isNaN(found.getTime()) ? null : found;
}
const clock = (at) => date(at)?.toLocaleTimeString("en-GB") ?? "";
function when(at) {
  const day = date(at), is_today = day?.toDateString() === new Date().toDateString();
  return is_today || day === null ? clock(at) : `${day.toLocaleDateString("en-CA")} ${clock(at)}`;
}
const SILENT = {
  connecting: "connecting", dead: "not running", silent: "no answer", denied: "no permission",
  gone: "connection ended", busy: "too many clients", "no protector": "not a protector", stopped: "stopped",
};

// -- the document --------------------------------------------------------------

function text(element, value) {
  if (element.textContent !== value) element.textContent = value;
}
function set(element, name, value) {
  if (element.getAttribute(name) !== value) element.setAttribute(name, value);
}
function made(tag, value, kind) {
  const element = document.createElement(tag);
  if (value !== undefined) element.textContent = value;
  if (kind) element.className = kind;
  return element;
}
const copy = (id) => $(id).content.firstElementChild.cloneNode(true);
/** Make an element show an age, updated each second.  until: the time at which the age stopped growing. */
function since(element, at, before, until) {
  element.dataset.since = at ?? "";
  element.dataset.until = until ?? "";
  element.dataset.before = before;
  age(element);
}
function age(element) {
  const { since: at, until, before } = element.dataset;
  const end = until === "" ? frozen ?? now() : Number(until);
  text(element, at === "" ? "" : before + span(end - at));
}

function tone(data) {
  if (data.why === "stopped") return "off";
  if (data.why) return data.why === "connecting" ? "wait" : "bad";
  if (data.phase === "waiting" || data.health === "unhealthy" || (data.failed && data.failed.last)) return "bad";
  if (data.phase === "stopping" || data.notes.length) return "warn";
  return data.phase === "serving" ? "good" : "busy";
}
function trouble(data) {
  if (data.why) return SILENT[data.why] || data.why;
  if (data.phase === "waiting") return "not serving";
  if (data.health === "unhealthy") return "unhealthy";
  if (data.failed && data.failed.last) return `release ${data.failed.generation} failed`;
  return data.notes[0] || data.phase;
}

function draw(one) {
  const { data, card } = one;
  set(card, "data-tone", tone(data));
  set(card, "data-health", data.health || "");
  set(card, "data-phase", data.why === "stopped" ? "stopped" : data.why ? "silent" : data.phase);
  text(card.querySelector(".name"), data.name);
  text(card.querySelector(".head .phase"), data.why ? SILENT[data.why] || data.why : data.phase);
  const seen = data.why && data.seen;
  card.toggleAttribute("data-old", Boolean(seen));
  const old = data.why === "stopped" ? `Stopped at ${when(seen)}.` : `Last seen at ${when(seen)}; its workers may still serve.`;
  text(card.querySelector(".old"), seen ? old : "");
  card.querySelector(".figures").hidden = data.phase === undefined;
  if (data.phase === undefined) return; // the instance has never answered
  const where = card.querySelector(".where");
  const words = data.listens.length ? [data.listens.slice(0, 3).join(" ") + (data.listens.length > 3 ? ` and ${data.listens.length - 3} more` : "")] : [];
  if (data.health && data.health !== "unhealthy") words.push(data.health === "healthy" ? "healthy" : "health unknown");
  if (data.tried && data.tried.passed) words.push(`dry run ${data.tried.generation} passed`);
  words.push(`pid ${data.pid}`, `version ${data.version}`);
  if (data.restarts) words.push(`${data.restarts} ${data.restarts === 1 ? "restart or upgrade" : "restarts or upgrades"}`);
  if (data.crashes) words.push(`${data.crashes} ${data.crashes === 1 ? "crash" : "crashes"}`);
  since(where, data.started, words.join(" · ") + " · up ", seen);
  for (const [name, field] of [["notes", "notes"], ["waits", "waits_for"], ["warnings", "warnings"]]) {
    const list = card.querySelector("." + name), lines = data[field] || [];
    if (list.textContent !== lines.join("")) list.replaceChildren(...lines.map((line) => made("li", line)));
  }
  const values = card.querySelectorAll(".figures b");
  text(values[0], number(data.rate));
  text(values[1], number(data.active));
  text(values[2], wait(data.p99));
  ["rate", "active", "waits"].forEach((name, place) => (values[place].closest("div").hidden = data.unknown.includes(name)));
  text(card.querySelector(".unknown"), missing(data.unknown));
  drawLanes(one);
  text(card.querySelector(".more"), data.more_lanes ? `and ${number(data.more_lanes)} older; socketprotectorctl status has all` : "");
  const { failed, tried } = data;
  drawVerdict(card.querySelector(".failed"), failed, failed && `release ${failed.generation} failed at ${when(failed.at)}${failed.last ? "" : ", a later one is serving"}`, data.name);
  drawVerdict(card.querySelector(".tried"), tried && !tried.passed && { ...tried, last: true }, tried && `dry run ${tried.generation} failed at ${when(tried.at)}`, data.name);
}

const FIGURES = { rate: "connections/s", active: "active connections", waits: "waits" };
function missing(unknown) {
  const words = unknown.filter((name) => name in FIGURES).map((name) => FIGURES[name]);
  if (!words.length) return "";
  const last = words.pop();
  return `Unknown: ${words.length ? `${words.join(", ")} and ` : ""}${last}. Only workers with the client library count them.`;
}

function drawLanes(one) {
  const list = one.card.querySelector(".lanes");
  list.toggleAttribute("data-single", one.data.lanes.length === 1);
  const left = new Set(one.lanes.keys());
  one.data.lanes.forEach((lane, place) => {
    let item = one.lanes.get(lane.number);
    if (!item) one.lanes.set(lane.number, (item = copy("lane")));
    left.delete(lane.number);
    if (list.children[place] !== item) list.insertBefore(item, list.children[place] || null);
    drawLane(item, lane, one.data);
  });
  for (const gone of left) {
    one.lanes.get(gone).remove();
    one.lanes.delete(gone);
  }
}

function drawLane(item, lane, data) {
  set(item, "data-phase", lane.phase);
  text(item.querySelector(".number"), `generation ${lane.number}`);
  const seen = data.why && data.seen;
  text(item.querySelector(".phase"), seen ? `was ${lane.phase}` : lane.phase);
  since(item.querySelector(".age"), lane.since, "", seen);
  const path = item.querySelector(".path");
  text(path, lane.path.split("/").slice(-2).join("/")); // enough to tell releases such as /srv/app-8/daemon apart
  set(path, "title", lane.path);
  text(item.querySelector(".note"), lane.note);
  const values = item.querySelectorAll(".numbers b");
  const queue = lane.queue == null || data.limit == null || lane.phase !== "serving" ? number(lane.queue) : `${number(lane.queue)} / ${number(data.limit)}`;
  [number(lane.rate), number(lane.active), queue, wait(lane.p50), wait(lane.p99)].forEach((value, place) => {
    text(values[place], value);
    values[place].parentElement.hidden = lane.unknown.includes(["rate", "active", "queue", "waits", "waits"][place]);
  });
  const drain = item.querySelector(".drain");
  drain.hidden = !lane.drain;
  if (lane.drain) drawDrain(drain, lane);
  drawWorkers(item.querySelector(".workers"), lane);
}

function drawDrain(drain, lane) {
  const { left, of, what, by, more } = lane.drain;
  const done = of ? Math.round((100 * (of - left)) / of) : 100;
  const bar = drain.querySelector(".bar");
  set(bar, "aria-valuenow", String(done));
  set(bar, "aria-label", `generation ${lane.number} drained`);
  bar.firstElementChild.style.width = `${done}%`;
  let said = `${number(left)} of ${number(of)} ${what} left`;
  if (by.length) said += `; kept alive by ${by.join(", ")}${more ? ` and ${more} more` : ""}`;
  text(drain.querySelector("p"), said);
}

function drawWorkers(box, lane) {
  box.hidden = !lane.size;
  text(box.querySelector(".size"), `${number(lane.size)} ${lane.size === 1 ? "worker" : "workers"}`);
  const cells = box.querySelector(".cells");
  const rest = lane.size - lane.workers.filter(([, , state]) => state !== "child").length;
  while (cells.children.length > lane.workers.length) cells.lastElementChild.remove();
  lane.workers.forEach(([, , state, active], place) => {
    const cell = cells.children[place] && cells.children[place].tagName === "I" ? cells.children[place] : null;
    const there = cell || cells.insertBefore(made("i"), cells.children[place] || null);
    set(there, "data-state", state);
    there.classList.toggle("active", active > 0);
  });
  if (rest > 0) cells.append(made("span", `and ${number(rest)} more`));
  const states = new Map();
  for (const [, , state] of lane.workers) states.set(state, (states.get(state) || 0) + 1);
  const said = [...states].map(([state, count]) => `${count} ${state}`).join(", ");
  set(cells, "aria-label", `${number(lane.size)} workers${said ? `: ${said}` : ""}${rest > 0 ? `, and ${rest} more` : ""}`);
  box.lane = lane;
  if (box.open) drawTable(box);
  else if (!box.heard) {
    box.heard = true;
    box.addEventListener("toggle", () => box.open && drawTable(box));
  }
}

function drawTable(box) {
  const row = (worker) => {
    const line = made("tr");
    line.append(...worker.map((value, place) => made("td", place === 3 ? number(value) : String(value))));
    return line;
  };
  box.querySelector("tbody").replaceChildren(...box.lane.workers.map(row));
}

function drawVerdict(box, failed, title, name) {
  box.hidden = !failed;
  if (!failed) return;
  const key = `${failed.generation} ${failed.at} ${failed.last}`;
  if (box.dataset.key !== key) {
    box.dataset.key = key; // the reader may open or close the box until there is another verdict
    box.open = failed.last;
  }
  text(box.querySelector("summary"), title);
  text(box.querySelector(".reason"), failed.reason);
  text(box.querySelector(".last"), failed.last_line);
  const words = box.querySelector("pre");
  words.hidden = !failed.words;
  set(words, "aria-label", `last words of release ${failed.generation} of ${name}`);
  text(words, failed.words);
}

const TITLES = ["connections a second", "active connections", "queue wait p99"];
const SHOWN = [number, number, wait];
function sparklines(one) {
  one.card.querySelectorAll("svg").forEach((svg, column) => {
    const values = [];
    for (let at = step - STEPS + 1; at <= step; at++) {
      const point = one.points.get(at);
      values.push(point ? point[column] : null);
    }
    const known = values.filter((value) => value != null);
    const most = Math.max(1, ...known);
    let line = "", area = "", before = null;
    values.forEach((value, x) => {
      // All steps of time have the same width, even a single one.
      if (value != null) {
        const y = (29 - (28 * value) / most).toFixed(1);
        line += `${before == null ? "M" : "L"}${x} ${y}H${x + 1}`;
        area += `M${x} 30V${y}H${x + 1}V30Z`;
      }
      before = value;
    });
    set(svg.children[1], "d", area);
    set(svg.children[2], "d", line);
    const said = known.length ? `now ${SHOWN[column](values.at(-1))}, at most ${SHOWN[column](most)}` : "not known";
    set(svg, "aria-label", `${TITLES[column]}, ten minutes: ${said}`);
  });
}

const counted = (counts) => [...counts].sort().map(([word, count]) => [count, word]);
function write(list, parts) {
  const key = JSON.stringify(parts.map(([value, word]) => [number(value), word]));
  if (list.dataset.key === key) return;
  list.dataset.key = key;
  list.replaceChildren(...parts.map(([value, word]) => {
    const item = made("li");
    item.append(made("b", number(value)), ` ${word}`);
    return item;
  }));
}
function attend(troubles) {
  const list = $("attention").firstElementChild, key = JSON.stringify(troubles);
  $("attention").hidden = !troubles.length;
  if (list.dataset.key === key) return;
  list.dataset.key = key;
  list.replaceChildren(...troubles.slice(0, TROUBLES).map(([where, name, words]) => {
    const item = made("li"), link = made("a");
    link.href = where;
    link.append(made("b", name), " ", made("span", words));
    item.append(link);
    return item;
  }));
  if (troubles.length > TROUBLES) list.append(made("li", `and ${number(troubles.length - TROUBLES)} more`));
}
/** Sum the known rates, and say of how many instances: unknown is not 0. */
function total(rates) {
  if (!rates.length) return [];
  const of = rates.length < instances.size ? ` in ${number(rates.length)} of them` : "";
  return [[rates.reduce((sum, rate) => sum + rate, 0), `connections/s${of}`]];
}
function summarize() {
  const counts = new Map();
  const rates = [], wrong = [];
  for (const { data, card } of instances.values()) {
    const word = data.why ? SILENT[data.why] || data.why : data.phase;
    counts.set(word, (counts.get(word) || 0) + 1);
    if (!data.why && data.rate != null) rates.push(data.rate);
    if (["bad", "warn"].includes(card.dataset.tone)) wrong.push(data);
  }
  write($("summary"), [[instances.size, instances.size === 1 ? "instance" : "instances"], ...total(rates), ...counted(counts)]);
  wrong.sort(byName);
  const troubles = wrong.map((data) => [`#i-${data.id}`, data.name, trouble(data)]);
  attend(troubles);
  document.title = `${troubles.length ? `(${troubles.length}) ` : ""}${$("host").textContent || "SocketProtector"}`;
  $("empty").hidden = instances.size > 0;
  document.documentElement.toggleAttribute("data-dense", instances.size > DENSE);
}

/** Give each card enough rows of the grid to leave no hole below a short card. */
const sizes = new ResizeObserver((entries) => {
  for (const { target } of entries) {
    const gap = Number.parseFloat(getComputedStyle(target).marginBottom);
    target.style.gridRowEnd = `span ${Math.ceil((target.offsetHeight + gap) / 4)}`;
  }
});
const byName = (a, b) => a.name.localeCompare(b.name, "en", { numeric: true });
function arrange() {
  const sorted = [...instances.values()].sort((a, b) => byName(a.data, b.data));
  sorted.forEach(({ card }, place) => {
    if ($("cards").children[place] !== card) $("cards").insertBefore(card, $("cards").children[place] || null);
  });
  sift();
}
function sift() {
  for (const { data, card } of instances.values()) card.hidden = !data.name.toLowerCase().includes(filter);
}

// -- messages from the exporter ------------------------------------------------

function take(one, points) {
  if (!points || !points.step) return;
  points.rate.forEach((_, place) => {
    const point = [points.rate[place], points.active[place], points.p99[place]];
    // Points from before a restart of the exporter stay.
    if (point.some((value) => value != null)) one.points.set(points.step - points.rate.length + 1 + place, point);
  });
  step = Math.max(step, points.step);
  for (const at of one.points.keys()) if (at <= step - STEPS) one.points.delete(at);
}

function show(data) {
  let one = instances.get(data.id);
  const renamed = !one || one.data.name !== data.name;
  if (!one) {
    one = { card: copy("card"), points: new Map(), lanes: new Map() };
    one.card.id = `i-${data.id}`;
    sizes.observe(one.card);
    instances.set(data.id, one);
  }
  one.data = data;
  draw(one);
  if (data.history) {
    take(one, data.history);
    delete data.history;
    sparklines(one);
  }
  return renamed;
}

function keep(ids) {
  const there = new Set(ids);
  for (const [id, { card }] of instances) {
    if (!there.has(id)) {
      card.remove();
      instances.delete(id);
    }
  }
}

/** Show the state of the connection to the exporter.  Without a connection, clocks stop, and everything is grey. */
function link(state, words) {
  if (state !== "lost") frozen = null;
  else if (frozen === null) frozen = now();
  set($("link"), "data-link", state);
  set(document.documentElement, "data-link", state);
  text($("link"), words);
}
function hear(message) {
  heard = Date.now();
  link("live", "live");
  return JSON.parse(message.data);
}
const lost = () => link("lost", `no exporter since ${clock(frozen ?? now())}; trying again`);

function connect() {
  source = new EventSource("events");
  source.addEventListener("hello", (message) => {
    const hello = hear(message);
    if (version !== null && version !== hello.version) location.reload(); // the exporter was replaced: load its page
    version = hello.version;
    opened ??= hello.now;
    offset = Date.now() / 1000 - hello.now;
    text($("host"), hello.host);
    keep(hello.ids);
    summarize();
  });
  source.addEventListener("state", (message) => {
    const state = hear(message);
    offset = Date.now() / 1000 - state.now;
    if (state.ids) keep(state.ids);
    let moved = false;
    for (const data of state.instances) moved = show(data) || moved;
    if (moved) arrange();
    if (state.points) patience_s = SILENT_S; // the start is over
    for (const [id, points] of Object.entries(state.points || {})) {
      const one = instances.get(id);
      if (one) {
        take(one, points);
        sparklines(one);
      }
    }
    for (const happened of state.events) tell(happened, happened.at > opened);
    summarize();
  });
  source.onopen = () => (heard = Date.now());
  source.onerror = () => {
    lost();
    if (source.readyState === EventSource.CLOSED) setTimeout(connect, 2000); // the connection was refused
  };
}

$("filter").addEventListener("input", () => {
  filter = $("filter").value.trim().toLowerCase();
  sift();
});
setInterval(() => {
  // The exporter sends a message every 5 s.  A connection through a tunnel may end silently.
  const silent_s = source.readyState === EventSource.OPEN ? (Date.now() - heard) / 1000 : 0;
  if (silent_s > SILENT_S) lost();
  if (silent_s > patience_s) {
    patience_s *= 2; // one message of the start may take longer over a slow network
    source.close();
    connect();
  }
  document.querySelectorAll("[data-since]").forEach(age);
}, 1000);
connect();
