// What each chart of the page shows: rows, titles and tables, from counts and the prices that page.js gives. Drawing is charts.js's.
"use strict";

const generation = (name) => data.generations.find((g) => g.name === name);
const shown = (work) => work.variants.filter((v) => v.technique !== "native");
const look = (technique) => data.looks[technique] || {colour: "#8a8a8a", marker: "X"};
const last = (list) => list[list.length - 1];
const workHere = () => data.workloads[state.work];
const rowOf = (variant) => ({label: variant.label, look: look(variant.technique), hollow: variant.hollow});

function slowdowns(work, name) {
  return shown(work).map((variant) => ({...rowOf(variant), ...(ratioOf(last(variant.cells), name) || {})}));
}

const CHARTS = {
  slowdown(host) {
    const order = [state.work, ...data.workloads.keys()].filter((w, i, all) => all.indexOf(w) === i).slice(0, 8);
    const panels = order.map((w) => [data.workloads[w], slowdowns(data.workloads[w], state.cpu)]);
    const all = panels.flatMap(([, rows]) => rows);
    const title = slowdownTitle(panels[0][0], panels[0][1]);
    host(title, panels.map(([work, rows]) => (width) => dotPanel(work.label, rows, width, all)), null,
      ["workload", "technique", "slowdown", "5 %", "95 %"],
      panels.flatMap(([work, rows]) => rows.map((row) => [work.label, row.label, ...(row.value === undefined ? ["–", "–", "–"] : [row.value, row.low, row.high].map(times))])));
  },

  causes(host) {
    const work = workHere(), rows = [];
    let counted = false;
    for (const variant of work.variants) {
      const index = last(variant.cells), price = priceOf(index, state.cpu), per = data.cells[index].operations || 1;
      counted = counted || data.cells[index].operations > 0;
      rows.push(price ? {...rowOf(variant), total: price.total / per, parts: data.causes.filter((c) => price.breakdown[c]).map((c) => [c, price.breakdown[c] / per])} : rowOf(variant));
    }
    const unit = counted ? "cycles per operation" : "cycles";
    const priced = rows.filter((row) => row.parts).sort((a, b) => a.total - b.total);
    const used = data.causes.filter((cause) => priced.some((row) => row.parts.some(([name]) => name === cause)));
    host(causesTitle(priced, work), byScale(priced).map((group) => (width) => stackPanel(group, width, data.colours, unit, priced)),
      legend(used.map((cause) => ({label: cause, colour: data.colours[cause]}))), ["technique", "cause", unit, "share"],
      priced.flatMap((row) => row.parts.map(([cause, cycles]) => [row.label, cause, cyclesText(cycles), Math.round(100 * cycles / row.total) + " %"])), "wide");
  },

  density(host) {
    const work = workHere();
    const series = shown(work).map((variant) => ({...rowOf(variant), points: variant.cells.flatMap((index) => {
      const ratio = ratioOf(index, state.cpu);
      return ratio ? [[Number(data.cells[index].parameters.density) || 0, ratio.value, ratio.low, ratio.high]] : [];
    })})).filter((one) => one.points.length);
    const all = series.flatMap((one) => one.points.flatMap((p) => [p[2], p[3]]));
    if (!series.some((one) => one.points.length > 1)) { host("One density only: nothing to compare for " + work.name, [], null, [], []); return; }
    host(densityTitle(series), [(width) => linePanel(work.name + " on " + generation(state.cpu).short, "per 1000 other instructions", series, width, all)],
      legend(series), ["technique", "density", "slowdown", "5 %", "95 %"],
      series.flatMap((one) => one.points.map((p) => [one.label, String(p[0]), times(p[1]), times(p[2]), times(p[3])])), "one");
  },

  generations(host) {
    const works = [workHere(), ...data.workloads.filter((w) => w !== workHere())].slice(0, 4);
    const panels = works.map((work) => [work, shown(work).map((variant) => ({...rowOf(variant), points: data.generations.flatMap((g, i) => {
      const ratio = ratioOf(last(variant.cells), g.name);
      return ratio ? [[i, ratio.value, ratio.low, ratio.high]] : [];
    })}))]);
    const all = panels.flatMap(([, series]) => series.flatMap((one) => one.points.flatMap((p) => [p[2], p[3]])));
    const names = data.generations.map((g) => g.short), joined = data.generations.map((g) => g.joined);
    host(generationsTitle(works[0]), panels.map(([work, series]) => (width) => ladderPanel(work.label, names, joined, series, width, all)),
      legend(panels[0][1]), ["workload", "technique", ...names],
      panels.flatMap(([work, series]) => series.map((one) => [work.label, one.label, ...data.generations.map((_, i) => {
        const point = one.points.find((p) => p[0] === i);
        return point ? times(point[1]) : "–";
      })])));
  },

  exits(host) {
    const work = workHere(), rows = [], table = [];
    for (const variant of shown(work)) {
      const index = last(variant.cells), cell = data.cells[index], price = priceOf(index, state.cpu), found = exitsOf(cell);
      const all = found.reduce((sum, [, count]) => sum + count, 0), per = cell.operations || 1;
      const parts = found.map(([kind, count]) => [kind, count / per]).filter(([, often]) => often >= 0.0005);
      if (parts.length) rows.push({...rowOf(variant), parts, total: parts.reduce((sum, [, often]) => sum + often, 0)});
      for (const [kind, count] of found) {
        const each = price ? roundTrip(kind, gateOf(cell)) : null;
        table.push([variant.label, data.words[kind], count.toLocaleString("en-US"), (100 * count / all).toFixed(1) + " %", cell.operations ? cyclesText(count / per) : "–",
          each === null ? "–" : cyclesText(each), each === null ? "–" : (100 * each * count / price.total).toFixed(1) + " %"]);
      }
    }
    const counted = work.variants.some((variant) => data.cells[last(variant.cells)].operations), unit = counted ? "exits per operation" : "exits";
    const colours = reasonColours(rows), grey = rows.some((row) => row.parts.some(([kind]) => !colours[kind]));
    const title = exitsTitle(work, rows);
    for (const row of rows) {
      const named = Object.keys(colours).flatMap((kind) => row.parts.filter(([name]) => name === kind));
      const rest = row.parts.filter(([kind]) => !colours[kind]).reduce((sum, [, often]) => sum + often, 0);
      row.parts = [...named.map(([kind, often]) => [data.words[kind], often]), ...(rest ? [["other reasons", rest]] : [])];
    }
    const words = Object.fromEntries(Object.entries(colours).map(([kind, colour]) => [data.words[kind], colour]));
    host(title, byScale(rows).map((group) => (width) => stackPanel(group, width, words, unit, rows)),
      legend([...Object.entries(words).map(([label, colour]) => ({label, colour})), ...(grey ? [{label: "other reasons", colour: "#8a8a8a"}] : [])]),
      ["technique", "reason", "times", "of its exits", "per operation", "cycles each", "of its cycles"], table, "wide");
  },

  ablation(host) {
    const {technique, everything, works} = data.ablation, style = look(technique);
    const parts = works.map((work) => {
      const whole = priceOf(work.whole, state.cpu);
      return [work, work.parts.map(([label, index]) => {
        const price = priceOf(index, state.cpu), value = whole && price ? price.total / whole.total : undefined;
        return {label, look: style, hollow: 0, value, low: value, high: value};
      }).sort((a, b) => (a.label !== everything) - (b.label !== everything) || (b.value || 0) - (a.value || 0))];
    });
    const all = parts.flatMap(([, rows]) => rows), warm = works.filter((work) => work.warmUp.length > 1);
    host(ablationTitle(parts[0], everything), [...parts.map(([work, rows]) => (width) => dotPanel(work.name, rows, width, all, "all on")),
      ...warm.map((work) => (width) => growthPanel(work.name + ": warm-up", "guest instructions", ["units translated", "exits chained"], work.warmUp, style.colour, width))], null,
      ["workload", "without", "time"], parts.flatMap(([work, rows]) => rows.map((row) => [work.name, row.label, row.value === undefined ? "–" : times(row.value)])));
  },

  nanobenchmarks(host) {
    const cpu = generation(state.cpu), tables = data.operations.map((table) => ({...table, rows: table.rows.map((row) => ({...row, figures: row.figures.map((figure) => {
      const ours = operationOn(figure, table.profile), here = table.profile === state.cpu ? null : operationOn(figure, state.cpu);
      return {...figure, ours, here: here && here.value, look: look(table.systems[figure.system][1])};
    })}))}));
    const techniques = [...new Set(tables.flatMap((table) => table.systems.map(([, technique]) => technique)))];
    const number = (value) => value === null || value === undefined ? "–" : Math.abs(value) >= 10 ? Math.round(value).toLocaleString("en-US") : value.toFixed(1);
    const elsewhere = tables.some((table) => table.profile !== state.cpu);
    host(nanoTitle(tables), tables.map((table) => (width) => operationsPanel(`${table.title}: ours on ${table.short}, published on ${table.cpu}`, table, cpu.short, width)),
      legend([...techniques.map((name) => ({label: look(name).short || name, look: look(name)})), {label: "published", look: {colour: "#1a1a1a", marker: "o"}, hollow: 1},
        ...(elsewhere ? [{label: "ours on " + cpu.short, look: {colour: "#1a1a1a", marker: "|"}}] : [])]),
      ["published by", "operation", "system", "ours, cycles", "5 %", "95 %", "published", "ours / published", "ours on " + cpu.short],
      tables.flatMap((table) => table.rows.flatMap((row) => row.figures.map((figure) => {
        const {ours, published} = figure, here = table.profile === state.cpu ? ours && ours.value : figure.here;
        return [table.title, row.words + (row.note ? ` (${row.note})` : ""), table.systems[figure.system][0], number(ours && ours.value) + (ours && figure.calibrated ? " *" : ""), number(ours && ours.low), number(ours && ours.high),
          number(published), ours && published ? shareText(ours.value / published) : "–", number(here)];
      }))), "wide");
  },
};

// ---- exits: why the CPU left the guest (vmlab/report/exits.py)
const LEAVING = ["exit.", "trap.", "hypercall.", "bt.callout."];

// How a cell's hypercalls enter: by INT n, in 64 bits by SYSCALL.
const gateOf = (cell) => cell.events.some((kind, i) => i % 2 === 0 && data.kinds[kind] === "trap.syscall") ? "trap.syscall" : "trap.int";

// [kind, count], most frequent first. The gate of a hypercall is not an exit of its own.
function exitsOf(cell) {
  const found = [], gateway = gateOf(cell);
  let calls = 0;
  for (let i = 0; i < cell.events.length; i += 2) if (data.kinds[cell.events[i]].startsWith("hypercall.")) calls += cell.events[i + 1];
  for (let i = 0; i < cell.events.length; i += 2) {
    const kind = data.kinds[cell.events[i]], gate = kind === gateway ? calls : 0, count = Math.max(0, cell.events[i + 1] - gate);
    if (count && LEAVING.some((prefix) => kind.startsWith(prefix))) found.push([kind, count]);
  }
  return found.sort((a, b) => b[1] - a[1] || (a[0] < b[0] ? -1 : 1));
}

// Cycles of one exit at the reader's costs: with the entry that follows, with the gate of a hypercall. Null where this CPU has no figure.
function roundTrip(kind, gate) {
  const model = modelOf(state.cpu), back = kind.startsWith("exit.") ? "entry" : kind.startsWith("hypercall.") ? gate : null;
  try {
    return model.unit(kind) + (back ? model.unit(back) : 0);
  } catch (lacking) {
    if (!(lacking instanceof NoFigure)) throw lacking;
    return null;
  }
}

// The reasons that weigh most in the workload shown have a colour, the others are grey together.
function reasonColours(rows) {
  const weight = new Map();
  for (const row of rows) {
    for (const [kind, often] of row.parts) if (often >= 0.02 * row.total) weight.set(kind, (weight.get(kind) || 0) + often / row.total);
  }
  const first = [...weight].sort((a, b) => b[1] - a[1] || (a[0] < b[0] ? -1 : 1)).slice(0, data.reasonColours.length);
  return Object.fromEntries(first.map(([kind], i) => [kind, data.reasonColours[i]]));
}

function exitsTitle(work, rows) {
  if (!rows.length) return `${work.name}: no technique leaves the guest`;
  const most = rows.reduce((a, b) => b.total > a.total ? b : a), [kind, often] = most.parts.reduce((a, b) => b[1] > a[1] ? b : a);
  const never = shown(work).filter((variant) => !rows.some((row) => row.label === variant.label)).map((variant) => variant.label);
  const counted = data.cells[last(work.variants[0].cells)].operations;
  return `${work.name}: ${most.label} leaves the guest ${most.total >= 10 ? cyclesText(most.total) : Number(most.total.toPrecision(2))} times${counted ? " an operation" : ""}, ${Math.round(100 * often / most.total)} % of them for ${data.words[kind]}`
    + (never.length === 1 ? `; ${never[0]} never` : never.length ? `; ${never.length} others never` : "");
}

// ---- operations beside published figures (vmlab/report/nanobench.py)
// {value, low, high} of one operation on a CPU at the reader's costs: (loop - empty loop) / iterations. Null where there is no price.
function operationOn(figure, name) {
  if (!figure.events) return null;
  const model = modelOf(name), counts = pricedCounts(data, figure.events);
  if (model.refusal(counts, figure.platform)) return null;
  const form = {constant: 0, events: Object.fromEntries(counts), costs: {}}, value = marginValue(form, model);
  const [low, high] = percentiles(marginSamples(form, model));
  return {value, low: Math.min(low, value), high: Math.max(high, value)};
}

function ablationTitle([work, rows], everything) {
  const priced = rows.filter((row) => row.value !== undefined), single = priced.filter((row) => row.label !== everything).slice(0, 2), together = priced.find((row) => row.label === everything);
  if (!priced.length) return `${work.name}: not priced on ${generation(state.cpu).short}`;
  return `${work.name}: ${single.map((row) => `${row.label} takes ${times(row.value)} as long`).join(" and ")}${together ? `; with all of it off, ${times(together.value)}` : ""}`;
}

function nanoTitle(tables) {
  const ratios = tables.flatMap((table) => table.rows.flatMap((row) => row.figures)).filter((f) => f.ours && f.published && !f.calibrated).map((f) => f.ours.value / f.published);
  if (!ratios.length) return "What one operation costs; nothing published to set beside it";
  return `${ratios.filter((ratio) => ratio >= 0.5 && ratio <= 2).length} of ${ratios.length} independent figures are within a factor of two of what was published`;
}

// Rows by ascending total, cut where a bar would be too short beside the longest of its panel.
function byScale(rows) {
  const groups = [];
  for (const row of [...rows].sort((a, b) => a.total - b.total)) {
    if (groups.length && row.total <= 8 * last(groups)[0].total) last(groups).push(row); else groups.push([row]);
  }
  return groups;
}

// ---- findings in words, computed from the figures shown
function slowdownTitle(work, rows) {
  const priced = rows.filter((row) => row.value !== undefined).sort((a, b) => a.value - b.value), cpu = generation(state.cpu).short;
  if (!priced.length) return "No technique was priced on " + cpu;
  const best = priced[0], worst = last(priced);
  const head = `${work.name} on ${cpu}: ${best.label} takes ${times(best.value)} native's time`;
  return best === worst ? head : `${head}, ${worst.label} ${times(worst.value)}`;
}

function causesTitle(priced, work) {
  const cpu = generation(state.cpu).short, worst = last(priced.filter((row) => row.label !== data.looks.native.short));
  if (!worst) return "No cell was priced by cause on " + cpu;
  const [cause, cycles] = worst.parts.reduce((a, b) => b[1] > a[1] ? b : a);
  return `${cause[0].toUpperCase()}${cause.slice(1)} ${cause.endsWith("s") ? "take" : "takes"} ${Math.round(100 * cycles / worst.total)} % of the cycles of ${worst.label} in ${work.name} on ${cpu}`;
}

function densityTitle(series) {
  const moves = series.filter((one) => one.points.length > 1).map((one) => ({label: one.label, a: one.points[0], b: last(one.points)})), cpu = generation(state.cpu).short;
  const by = (one) => one.b[1] / one.a[1], up = moves.reduce((a, b) => by(b) > by(a) ? b : a), down = moves.reduce((a, b) => by(b) < by(a) ? b : a);
  const head = `From ${up.a[0]} to ${up.b[0]} per 1000, ${up.label} goes from ${times(up.a[1])} to ${times(up.b[1])}`;
  return (up === down ? head : `${head}, ${down.label} from ${times(down.a[1])} to ${times(down.b[1])}`) + ` on ${cpu}`;
}

function generationsTitle(work) {
  let best = [0, ""];
  for (const variant of shown(work)) {
    const standing = data.generations.filter((g) => g.joined).flatMap((g) => {
      const ratio = ratioOf(last(variant.cells), g.name);
      return ratio ? [[ratio.high < 1 ? "beats native" : ratio.low > 1 ? "loses to native" : "is about even", g.short]] : [];
    });
    const words = [...new Set(standing.map(([word]) => word))];
    const weight = 2 * words.includes("beats native") + words.includes("loses to native");
    const list = (names) => names.length > 3 ? `${names.length} generations from ${names[0]} to ${last(names)}` : names.join(" and ");
    if (words.length > 1 && weight > best[0]) best = [weight, `${variant.label} ${words.map((word) => word + " on " + list(standing.filter(([w]) => w === word).map(([, g]) => g))).join(", ")}`];
  }
  return best[1] ? `${work.name}: ${best[1]}` : `${work.name}: against the bare machine no technique's standing changes over these generations`;
}
