// Other hosts: each has a cell.
"use strict";

const MANY = 60;
const hosts = new Map(); // id -> {data, cell}, in the order of the exporter's file

function drawHost({ data, cell }) {
  set(cell, "data-tone", data.tone);
  text(cell.querySelector(".name"), data.name);
  text(cell.querySelector(".state"), data.state);
  text(cell.querySelector(".note"), data.note);
  since(cell.querySelector(".age"), data.tone === "good" ? null : data.since, "for ");
  const counts = data.instances == null ? "" : [
    `${number(data.instances)} ${data.instances === 1 ? "instance" : "instances"}`,
    data.rate == null ? "" : `${number(data.rate)}/s`,
    data.active == null ? "" : `${number(data.active)} active`,
  ].filter(Boolean).join(" · ");
  text(cell.querySelector(".count"), counts);
  set(cell, "aria-label", [data.name, data.state, data.note, counts].filter(Boolean).join(", "));
}
function showHost(data) {
  const one = hosts.get(data.id);
  if (!one) return;
  if (data.tone === "bad" && one.data && one.data.tone !== "bad") text($("said"), `${data.name}: ${data.state} ${data.note}`);
  one.data = data;
  drawHost(one);
}
function keepHosts(ids) {
  if (ids.join() === [...hosts.keys()].join()) return;
  const before = new Map(hosts), cells = $("host-cells");
  hosts.clear();
  for (const id of ids) {
    const one = before.get(id) || { data: null, cell: copy("host-cell") };
    one.cell.id = `h-${id}`;
    hosts.set(id, one);
  }
  cells.replaceChildren(...[...hosts.values()].map(({ cell }) => cell));
  $("hosts").hidden = !hosts.size;
  $("hosts").toggleAttribute("data-many", hosts.size > MANY);
  enter();
}
/** Tab reaches one cell; the arrow keys move from there to the others. */
function enter(cell) {
  const shown = [...$("host-cells").children].filter((each) => !each.hidden);
  const at = cell || shown.find((each) => each.tabIndex === 0) || shown[0];
  for (const each of $("host-cells").children) if ((each === at) !== (each.tabIndex === 0)) each.tabIndex = each === at ? 0 : -1;
}
function walk(press) {
  const cells = [...$("host-cells").children].filter((each) => !each.hidden);
  const at = cells.indexOf(document.activeElement), below = cells.findIndex((each) => each.offsetTop > cells[0].offsetTop);
  const row = below < 0 ? cells.length : below;
  const to = cells[{ ArrowRight: at + 1, ArrowLeft: at - 1, ArrowDown: at + row, ArrowUp: at - row, Home: 0, End: cells.length - 1 }[press.key]];
  if (at < 0 || !to) return;
  press.preventDefault();
  to.focus();
}
