// The page follows its reader: CPU generation, workload, moved costs. Counts never change; only prices do.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const state = {cpu: data.order[0], work: 0, moved: new Map()}; // moved: "insn.cli" of a CPU as "cpu/key", a handler's length as "key"
let models = {}, prices = new Map(), ratios = new Map();

const byId = (id) => document.getElementById(id);
const isShared = (key) => Object.hasOwn(data.shared, key);
const moveName = (key) => isShared(key) ? key : state.cpu + "/" + key;

// ---- prices at the reader's costs
function overrideOf(name) {
  const found = {};
  for (const [move, value] of state.moved) {
    const [cpu, key] = move.includes("/") ? move.split("/") : [name, move];
    if (cpu === name) found[key] = value;
  }
  return found;
}

const isMoved = (name) => Object.keys(overrideOf(name)).length > 0;

function modelOf(name) {
  if (!models[name]) models[name] = new CostModel(data, name, overrideOf(name));
  return models[name];
}

function costsChanged() { models = {}; prices = new Map(); ratios = new Map(); }

function once(cache, id, make) {
  if (!cache.has(id)) cache.set(id, make());
  return cache.get(id);
}

// {total, low, high, breakdown} or null; the run's own figures while no cost of this CPU is moved.
function priceOf(index, name) {
  const cell = data.cells[index], known = cell.cycles[name];
  if (!known) return null;
  if (!isMoved(name)) return {total: known[0], low: known[1], high: known[2], breakdown: known[3]};
  return once(prices, index + " " + name, () => modelOf(name).price(pricedCounts(data, cell.events), cell.platform));
}

function ratioOf(index, name) {
  const cell = data.cells[index];
  if (cell.technique === "native") return cell.cycles[name] ? {value: 1, low: 1, high: 1} : null;
  const known = cell.slowdown[name];
  if (!known) return null;
  const native = data.cells[cell.native];
  if (!isMoved(name) || !native) return {value: known[0], low: known[1], high: known[2]};
  return once(ratios, index + " " + name, () => modelOf(name).slowdown(
    pricedCounts(data, cell.events), cell.platform, pricedCounts(data, native.events), native.platform));
}

// ---- drawing
function draw() {
  for (const figure of document.querySelectorAll("figure[data-chart]")) {
    const chart = CHARTS[figure.dataset.chart];
    if (!chart) continue;
    const live = figure.querySelector(".live"), table = figure.querySelector(".table");
    chart((title, panels, key, head, rows, layout) => {
      figure.querySelector(".title").textContent = title;
      live.className = "live " + (layout || (panels.length > 1 ? "grid" : "one"));
      live.replaceChildren(...(key ? [key] : []));
      const places = panels.map(() => html("div", {class: "panel-box"}));
      live.append(...places); // all of them before any is measured: the grid's columns depend on their number
      const widths = places.map((place) => Math.max(280, Math.min(place.clientWidth || 640, 860)));
      panels.forEach((panel, i) => places[i].append(panel(widths[i])));
      table.replaceChildren(rows.length ? figuresTable(head, rows) : "");
    });
  }
  drawClaims();
  const count = state.moved.size;
  byId("moved").textContent = count ? `${count} cost${count > 1 ? "s" : ""} moved: charts and verdicts are at your costs, the sentences above and the tables of cells at the published ones.` : "All costs are the published ones.";
  byId("reset").disabled = !count && state.cpu === data.order[0] && state.work === 0;
}

const SIGNS = {holds: "✓", fails: "✗", undecided: "?"};

function drawClaims() {
  for (const row of document.querySelectorAll("tr[data-claim]")) {
    const claim = data.claims[Number(row.dataset.claim)], found = state.moved.size ? judge(claim, modelOf) : null;
    const verdict = found ? found.verdict : claim.verdict, shade = Object.hasOwn(SIGNS, verdict) ? verdict : "undecided";
    const mark = row.querySelector(".verdict");
    mark.className = "verdict " + shade;
    mark.querySelector(".said").textContent = SIGNS[shade] + " " + verdict;
    mark.querySelector(".was").textContent = found && found.verdict !== claim.verdict ? "was: " + claim.verdict : "";
    row.querySelector(".reason").textContent = found ? found.reason : claim.reason || "";
    const by = found ? found.byProfile : claim.by_profile || {};
    row.querySelector(".by").textContent = Object.entries(by).map(([name, said]) => name + ": " + said).join("; ");
  }
}

// ---- costs to move
const SPAN = 8; // a slider goes this factor beyond the published range either way

function costRows() {
  const weight = new Map(), model = modelOf(state.cpu);
  for (const variant of workHere().variants) {
    const cell = data.cells[last(variant.cells)], counts = pricedCounts(data, cell.events);
    if (model.refusal(counts, cell.platform)) continue;
    const total = model.nominal(counts) || 1;
    for (const [kind, count] of counts) {
      for (const [factor, key] of data.rules[kind][1]) {
        const figure = model.figure(key), cycles = count * factor * figure.value * model.factor(figure.key);
        const resolved = Object.hasOwn(data.profiles[state.cpu].figures, key) || isShared(key) ? key : figure.key;
        weight.set(resolved, Math.max(weight.get(resolved) || 0, cycles / total));
      }
    }
  }
  return [...weight].filter(([, share]) => share >= 0.002).sort((a, b) => b[1] - a[1]);
}

const published = (key) => data.profiles[state.cpu].figures[key] || data.shared[key];
const unitOf = (key) => key.startsWith("path.") ? "instructions" : key.startsWith("shared.") ? "ns" : key === "mhz" ? "MHz" : "cycles";

function drawCosts() {
  const rows = costRows().map(([key, share]) => {
    const [value, low, high, provenance, source] = published(key), from = Math.log(low / SPAN), to = Math.log(high * SPAN);
    const now = state.moved.get(moveName(key)) ?? value, id = "cost-" + key.replace(/[^a-z0-9]/gi, "-");
    const slider = html("input", {type: "range", id, min: 0, max: 400, step: 1, "aria-describedby": id + "-source"});
    const box = html("input", {type: "number", min: 0.001, step: "any", "aria-label": data.costWords[key] + " in " + unitOf(key)});
    const note = html("span", {class: "note"});
    const place = (v) => 400 * (Math.log(v) - from) / (to - from);
    slider.style.setProperty("--low", place(low) / 400);
    slider.style.setProperty("--high", place(high) / 400);
    const show = (v) => {
      slider.value = place(v);
      box.value = Number(v.toPrecision(4));
      const outside = v < low * 0.9999 || v > high * 1.0001;
      note.textContent = v === value ? "" : outside ? "beyond the published range" : "within the published range";
      slider.setAttribute("aria-valuetext", `${Number(v.toPrecision(3))} ${unitOf(key)}, ${v === value ? "published" : note.textContent}`);
    };
    const move = (v) => {
      if (!(v > 0 && Number.isFinite(v))) return;
      if (v === value) state.moved.delete(moveName(key)); else state.moved.set(moveName(key), v);
      show(v);
      costsChanged();
      later();
    };
    show(now);
    slider.addEventListener("input", () => {
      const v = Math.exp(from + (to - from) * slider.value / 400);
      move(Math.abs(place(value) - slider.value) < 0.5 ? value : Number(v.toPrecision(3))); // the published value is a notch, narrower than a key press
    });
    box.addEventListener("change", () => move(Number(box.value)));
    return html("li", {class: "cost"}, html("label", {for: id}, data.costWords[key], html("small", {}, ` ${Math.round(100 * share)} % of a cell at most`)), slider, box, html("span", {}, " " + unitOf(key) + " "), note,
      html("small", {id: id + "-source"}, `${provenance}: ${value} (${low} to ${high})${source ? ", " + source : ""}`));
  });
  byId("costs-list").replaceChildren(...rows);
}

// ---- the setting as a link
function fragment() {
  const parts = [];
  if (state.cpu !== data.order[0]) parts.push("cpu=" + encodeURIComponent(state.cpu));
  if (state.work) parts.push("work=" + encodeURIComponent(workHere().name));
  for (const [move, value] of state.moved) parts.push(encodeURIComponent(move) + "=" + value);
  return parts.join("&");
}

function readFragment() {
  state.cpu = data.order[0];
  state.work = 0;
  state.moved.clear();
  for (const part of location.hash.slice(1).split("&")) {
    const [name, value] = part.split("=").map((text) => { try { return decodeURIComponent(text); } catch { return ""; } });
    if (value === undefined) continue;
    if (name === "cpu" && data.order.includes(value)) state.cpu = value;
    else if (name === "work") state.work = Math.max(0, data.workloads.findIndex((w) => w.name === value));
    else {
      const [cpu, key] = name.includes("/") ? name.split("/") : [null, name];
      const known = cpu === null ? isShared(key) : Object.hasOwn(data.profiles, cpu) && Object.hasOwn(data.profiles[cpu].figures, key);
      if (known && Number(value) > 0 && Number.isFinite(Number(value))) state.moved.set(name, Number(value));
    }
  }
  costsChanged();
}

let waiting = false;
function later() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => { waiting = false; draw(); keep(); });
}

function keep() {
  const hash = fragment();
  byId("permalink").setAttribute("href", "#" + hash);
  if (location.hash.slice(1) !== hash && !location.hash.startsWith("#term-")) history.replaceState(null, "", hash ? "#" + hash : location.pathname + location.search);
}

function everything() {
  byId("cpu").value = state.cpu;
  byId("work").value = state.work;
  drawCosts();
  draw();
  keep();
}

function openFor(hash) { // a link into a closed fold opens it
  const target = hash.length > 1 && byId(hash.slice(1));
  for (let fold = target && target.closest("details"); fold; fold = fold.parentElement.closest("details")) fold.open = true;
  if (target) target.scrollIntoView();
}

// ---- terms explained
function explainTerms() {
  const tip = html("div", {id: "tip", role: "tooltip", hidden: ""});
  document.body.append(tip);
  const show = (event) => {
    const term = event.target.closest && event.target.closest("a.term"), entry = term && byId(term.hash.slice(1));
    if (!entry) return;
    tip.textContent = entry.querySelector("dd").textContent;
    term.setAttribute("aria-describedby", "tip");
    tip.hidden = false;
    const box = term.getBoundingClientRect(), width = Math.min(360, innerWidth - 24);
    tip.style.width = width + "px";
    tip.style.left = Math.max(12, Math.min(box.left, innerWidth - width - 12)) + "px";
    const below = box.bottom + 6;
    tip.style.top = (below + tip.offsetHeight > innerHeight ? Math.max(6, box.top - tip.offsetHeight - 6) : below) + "px";
  };
  const hide = () => { tip.hidden = true; };
  for (const kind of ["mouseover", "focusin"]) document.addEventListener(kind, show);
  for (const kind of ["mouseout", "focusout"]) document.addEventListener(kind, hide);
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
}

function start() {
  for (const g of data.generations) byId("cpu").append(html("option", {value: g.name}, g.words));
  data.workloads.forEach((work, i) => byId("work").append(html("option", {value: i}, work.label)));
  readFragment();
  byId("controls").hidden = false;
  byId("cpu").addEventListener("change", () => { state.cpu = byId("cpu").value; everything(); });
  byId("work").addEventListener("change", () => { state.work = Number(byId("work").value); everything(); });
  byId("reset").addEventListener("click", () => { state.cpu = data.order[0]; state.work = 0; state.moved.clear(); costsChanged(); everything(); });
  addEventListener("hashchange", () => { if (/^#(term|chart)-/.test(location.hash)) openFor(location.hash); else { readFragment(); everything(); } });
  let width = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; later(); } });
  document.addEventListener("toggle", (event) => { if (event.target.open && event.target.querySelector("figure")) draw(); }, true);
  let closed = [];
  addEventListener("beforeprint", () => {
    if (document.body.classList.contains("printing")) return;
    closed = [...document.querySelectorAll("details.print:not([open])")];
    closed.forEach((fold) => { fold.open = true; });
    document.body.classList.add("printing");
    draw();
  });
  addEventListener("afterprint", () => { closed.forEach((fold) => { fold.open = false; }); document.body.classList.remove("printing"); draw(); });
  explainTerms();
  everything();
  if (/^#(term|chart)-/.test(location.hash)) openFor(location.hash);
  document.documentElement.dataset.ready = "yes";
}

if (data.generations.length && data.workloads.length) start(); else explainTerms();
