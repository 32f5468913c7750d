// The list of events.  Each release has a row, which shows its worst event and lists all of them.
"use strict";

const ROWS = 200, LISTED = 120;
const WEIGHTS = { error: 3, warning: 2 };
const SAID = new Set(["reloaded", "reload-failed", "start-failed", "recovered", "crash-loop", "stopped", "lame-duck", "held", "queue-stalled", "healthy", "unhealthy", "health-unknown", "dry-run-passed", "dry-run-failed"]);
const rows = new Map(); // id, run and generation -> {item, entries: [{key, happened}], the newest first}
const seenKeys = new Set();

const weight = ({ event, level }) => (event.endsWith("-failed") ? 4 : WEIGHTS[level] || (SAID.has(event) ? 2 : 1));

function tell(happened, live) {
  const key = JSON.stringify(happened);
  if (seenKeys.has(key)) return; // sent again after the connection was lost
  seenKeys.add(key);
  const item = happened.release ? inRelease(key, happened) : made("li", undefined, "row");
  if (!happened.release) {
    label(item, item, happened, true);
    item.forget = () => seenKeys.delete(key);
  }
  const list = $("events"), focused = document.activeElement;
  if (list.firstElementChild !== item) list.prepend(item);
  if (item.contains(focused)) focused.focus({ preventScroll: true }); // moving an element loses the focus
  while (list.children.length > ROWS) {
    list.lastElementChild.forget();
    list.lastElementChild.remove();
  }
  if (live && SAID.has(happened.event)) text($("said"), `${happened.name}: ${happened.event} ${happened.text}`);
}

/** Add an event to the row of its release, and return the row. */
function inRelease(key, happened) {
  const id = `${happened.id} ${happened.release}`;
  if (!rows.has(id)) {
    const item = copy("release");
    const entries = [];
    item.forget = () => {
      rows.delete(id);
      entries.forEach((each) => seenKeys.delete(each.key));
    };
    rows.set(id, { item, entries });
  }
  const { item, entries } = rows.get(id), list = item.querySelector("ol"), line = made("li");
  entries.unshift({ key, happened });
  label(line, line, happened, false);
  list.prepend(line);
  if (entries.length > LISTED) {
    seenKeys.delete(entries.pop().key);
    list.lastElementChild.remove();
  }
  const worst = entries.map((each) => each.happened).reduce((one, other) => (weight(other) > weight(one) ? other : one));
  label(item, item.querySelector("summary"), worst, true);
  return item;
}

/** Fill an element with an event.  whole: with the names of its instance and generation. */
function label(item, element, happened, whole) {
  item.dataset.level = happened.level;
  item.dataset.event = happened.event;
  const time = made("time", clock(happened.at)), day = date(happened.at);
  if (day) time.dateTime = day.toISOString();
  const names = whole ? [made("bdi", happened.name)] : [];
  if (whole && happened.generation) names.push(made("span", `generation ${happened.generation}`));
  const said = [made("b", happened.event), made("span", happened.text, "text")];
  if (happened.last) said.push(made("bdi", happened.last, "last"));
  element.replaceChildren(time, ...names, ...said);
}
