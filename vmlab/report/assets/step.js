// The stepper: shows one group of guest instructions at a time, and what every lane did for it. Recorded data only.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const state = {step: 0, lane: 0, cpu: data.cpu};
const last = data.groups.length - 1;
const lanes = data.lanes;
const plain = state.cpu;
let totals = []; // by lane: cycles up to and including each step, or null where this CPU could not have run it

function html(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

const count = (value) => value >= 10 || value === 0 ? Math.round(value).toLocaleString("en-US") : value.toFixed(1);

function price() {
  const model = new CostModel(data, state.cpu, {});
  totals = lanes.map((lane) => {
    if (lane.reason) return null;
    let sum = 0;
    const made = [];
    for (const group of lane.groups) {
      const counts = pricedCounts(data, group.events);
      if (model.refusal(counts, lane.platform)) return null;
      sum += model.nominal(counts);
      made.push(sum);
    }
    return made;
  });
}

const slug = (lane) => lane.technique + (lane.label ? ":" + lane.label.replace(/[^a-z0-9]+/gi, "-") : "");

// ---- drawing
function drawCode() {
  byId("code").replaceChildren(...data.groups.map((group, i) => {
    const line = html("li", {title: group.symbol}, html("span", {class: "at"}, group.address.padStart(10) + " "), group.code,
      ...(group.count > 1 ? [html("span", {class: "at"}, " " + group.symbol)] : []));
    line.addEventListener("click", () => go(i));
    return line;
  }));
}

const PLACES = {guest: "", cache: "in the translation cache: ", monitor: "the monitor's code: "};

// The instructions of a folded stretch, a loop's once with how often it went round.
function listing(path) {
  return html("ol", {class: "listing"}, ...path.flatMap((part) => {
    if (Array.isArray(part)) return data.codes.slice(part[0], part[0] + part[1]).map(([where, address, code]) =>
      html("li", {}, html("span", {class: "at"}, address.padStart(10) + " "), html("span", {class: "place"}, PLACES[where]), code));
    return [html("li", {class: "loop"}, html("span", {class: "at"}, part.times.toLocaleString("en-US") + " times"), listing(part.of))];
  }));
}

// A fold that is filled when it is opened first.
function fold(words, path) {
  const made = html("details", {class: "quiet"}, html("summary", {}, words));
  made.addEventListener("toggle", () => { if (made.open && made.children.length === 1) made.append(listing(path)); });
  return made;
}

const quiet = (line) => `${line.skipped.toLocaleString("en-US")} instructions, ${line.did.join("; ") || "no event"}`;

function ran(group) {
  if (!group.lines.length) return [html("li", {class: "none"}, "nothing here: this kernel or its interrupt took another way")];
  return group.lines.map((line) => {
    if (line.skipped) return html("li", {class: "none"}, fold(quiet(line), line.path));
    const made = html("li", {}, html("span", {class: "place"}, PLACES[line.where]), line.code);
    if (line.kind) made.append(html("span", {class: "event"}, line.kind + ": " + (line.did.join("; ") || line.kind)));
    return made;
  });
}

function stateOf(lane, i) {
  const now = lane.groups[i].after, then = lane.groups[i].before;
  const row = (name, index, words) => html("div", now[index] === then[index] ? {} : {class: "changed"},
    html("dt", {}, name), html("dd", {}, words ? words(now[index]) : String(now[index])));
  return [row("CPL", 0), row("real IF", 1), row("virtual IF", 2), row("waiting", 3, (who) => who || "–")];
}

function drawLanes() {
  const i = state.step, most = Math.max(1, ...totals.map((sums) => sums ? sums[i] : 0));
  const made = lanes.map((lane, number) => {
    const card = html("section", {class: "lane" + (number === state.lane ? " chosen" : ""), role: "listitem", tabindex: "-1", "aria-label": lane.name}, html("h3", {}, lane.name));
    card.style.setProperty("--lane", lane.colour);
    card.addEventListener("click", (event) => { if (!event.target.closest("details")) { state.lane = number; draw(); } }); // a fold is opened, not redrawn
    if (lane.reason) {
      card.append(html("p", {class: "none"}, "Not shown: " + lane.reason));
      return card;
    }
    const group = lane.groups[i], sums = totals[number];
    const cost = sums ? sums[i] - (i ? sums[i - 1] : 0) : null;
    const field = (name, words) => html("div", {}, html("dt", {}, name), html("dd", {}, words));
    const cycles = [field("cycles", sums ? count(cost) : "–"), field("so far", sums ? count(sums[i]) : "–")];
    const bar = html("div", {class: "bar", "aria-hidden": "true"}, html("span"));
    bar.firstChild.style.width = sums ? 100 * sums[i] / most + "%" : "0";
    card.append(html("ul", {class: "ran"}, ...ran(group)), html("dl", {class: "state"}, ...stateOf(lane, i), ...cycles), bar);
    return card;
  });
  byId("lanes").replaceChildren(...made);
}

function sentence() {
  const group = data.groups[state.step], lane = lanes[state.lane];
  const head = `Step ${state.step + 1} of ${last + 1}: the guest's ${group.code}${group.count > 1 && group.symbol ? " in " + group.symbol : ""}. `;
  if (lane.reason) return head + lane.name + " is not shown.";
  const here = lane.groups[state.step], [cpl, real, virtual, waits] = here.after;
  const events = here.lines.filter((line) => line.kind).map((line) => line.kind);
  const did = events.length ? events.join(", ") : here.lines.length ? "no event" : "nothing";
  return `${head}${lane.name}: ${did}; CPL ${cpl}, real IF ${real}, virtual IF ${virtual}${waits ? ", an interrupt waits for the " + waits : ""}.`;
}

function draw() {
  byId("step").value = state.step;
  byId("where").textContent = `${state.step + 1} of ${last + 1}`;
  byId("first").disabled = byId("back").disabled = state.step === 0;
  byId("end").disabled = byId("forward").disabled = state.step === last;
  byId("said").textContent = sentence();
  [...byId("code").children].forEach((line, i) => {
    line.classList.toggle("now", i === state.step);
    if (i === state.step) line.setAttribute("aria-current", "step"); else line.removeAttribute("aria-current");
  });
  const now = byId("code").children[state.step], box = byId("code");
  box.scrollTop = Math.max(0, now.offsetTop - box.clientHeight / 2);
  drawLanes();
  const parts = ["technique=" + encodeURIComponent(slug(lanes[state.lane])), "step=" + (state.step + 1)];
  if (state.cpu !== plain) parts.push("cpu=" + encodeURIComponent(state.cpu));
  byId("permalink").setAttribute("href", "#" + parts.join("&"));
  if (location.hash.slice(1) !== parts.join("&")) history.replaceState(null, "", "#" + parts.join("&"));
}

function go(step) {
  state.step = Math.max(0, Math.min(last, step));
  draw();
}

function readFragment() {
  for (const part of location.hash.slice(1).split("&")) {
    const [name, value] = part.split("=").map((text) => { try { return decodeURIComponent(text); } catch { return ""; } });
    if (value === undefined) continue;
    if (name === "step" && Number.isInteger(Number(value))) state.step = Math.max(0, Math.min(last, Number(value) - 1));
    else if (name === "technique") {
      const found = lanes.findIndex((lane) => slug(lane) === value), first = lanes.findIndex((lane) => lane.technique === value);
      if (found >= 0 || first >= 0) state.lane = found >= 0 ? found : first;
    } else if (name === "cpu" && data.order.includes(value)) state.cpu = value;
  }
  byId("cpu").value = state.cpu;
  price();
  draw();
}

function start() {
  for (const name of data.order) byId("cpu").append(html("option", {value: name}, `${data.profiles[name].words} (${data.profiles[name].year})`));
  byId("step").max = last;
  drawCode();
  for (const id of ["bar", "stage", "hint"]) byId(id).hidden = false;
  byId("step").addEventListener("input", () => go(Number(byId("step").value)));
  byId("cpu").addEventListener("change", () => { state.cpu = byId("cpu").value; price(); draw(); });
  for (const [id, to] of [["first", () => 0], ["back", () => state.step - 1], ["forward", () => state.step + 1], ["end", () => last]]) byId(id).addEventListener("click", () => go(to()));
  document.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
    const keys = {ArrowRight: () => go(state.step + 1), ArrowLeft: () => go(state.step - 1), Home: () => go(0), End: () => go(last),
      ArrowDown: () => { state.lane = (state.lane + 1) % lanes.length; draw(); }, ArrowUp: () => { state.lane = (state.lane + lanes.length - 1) % lanes.length; draw(); }};
    if (keys[event.key]) { event.preventDefault(); keys[event.key](); }
  });
  addEventListener("hashchange", () => {
    if (location.hash.startsWith("#term-")) { byId("glossary").open = true; document.querySelector(location.hash)?.scrollIntoView(); return; }
    readFragment();
  });
  addEventListener("beforeprint", () => { byId("all").open = true; });
  readFragment();
  document.documentElement.dataset.ready = "yes";
}

start();
