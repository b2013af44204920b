// Charts of the page, drawn as inline SVG from counts and prices. Text goes in as text, never as markup.
"use strict";

const SVG = "http://www.w3.org/2000/svg";

function svg(tag, attributes, ...children) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes || {})) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function html(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// A ratio with the figures that mean something, as the report's Python says it.
function times(value) {
  if (value >= 100) return Number(value.toPrecision(3)).toLocaleString("en-US") + "×";
  if (value >= 9.95) return value.toFixed(0) + "×";
  return (value < 1.95 ? value.toFixed(2) : value.toFixed(1)) + "×";
}

// Ours over a published figure: two figures that mean something, however small.
const shareText = (value) => Number(value.toPrecision(2)).toLocaleString("en-US", {maximumSignificantDigits: 2}) + "×";

const cyclesText = (value) => value >= 10 ? Math.round(value).toLocaleString("en-US") : value.toPrecision(2);

const MARKERS = {
  o: "M-5,0a5,5 0 1,0 10,0a5,5 0 1,0 -10,0", s: "M-4.6,-4.6h9.2v9.2h-9.2z", D: "M0,-6L6,0L0,6L-6,0z", "^": "M0,-5.6L5.6,4.6H-5.6z",
  "|": "M0,-6.5V6.5", P: "M-2,-5.6h4v3.6h3.6v4h-3.6v3.6h-4v-3.6h-3.6v-4h3.6z", X: "M-5,-5L5,5M5,-5L-5,5",
};

// `hollow` is a variant's number among those of its technique: solid, hollow, then grey.
function marker(look, hollow = 0, x = 0, y = 0) {
  return svg("path", {
    d: MARKERS[look.marker] || MARKERS.X, transform: `translate(${x},${y})`, fill: [look.colour, "#fff", "#c8c8c8"][Math.min(hollow, 2)], stroke: look.colour, "stroke-width": 1.6,
  });
}

// Log-axis limits with some room, always with 1 inside; ticks at 1, 2, 5 where the axis is short.
function logAxis(values, from, to) {
  let low = Math.min(0.8, ...values), high = Math.max(1.25, ...values);
  const room = (high / low) ** 0.08;
  low /= room; high *= room;
  const ticks = [], steps = high / low < 30 ? [1, 2, 5] : [1];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
    for (const step of steps) {
      const tick = Number((step * 10 ** power).toPrecision(3));
      if (tick >= low && tick <= high) ticks.push(tick);
    }
  }
  const place = (value) => from + (to - from) * Math.log(value / low) / Math.log(high / low);
  return {place, ticks, low, high};
}

// `bands`: from where to where the lines go down; between them stand the rows' names, where these are not beside.
function ratioGrid(root, axis, bands, bottom, unity = "native") {
  for (const tick of axis.ticks) {
    const x = axis.place(tick), one = tick === 1;
    for (const [from, to] of bands) root.append(svg("line", {x1: x, x2: x, y1: from, y2: to, stroke: one ? "#1a1a1a" : "#d0d0d0", "stroke-width": one ? 1.4 : 0.8}));
    root.append(svg("text", {x, y: bottom + 15, "text-anchor": "middle", class: "tick"}, one ? unity : tick + "×"));
  }
}

// Words on lines that fit a width, `each` pixels a character.
function wrapped(words, width, each) {
  const lines = [""];
  for (const word of words.split(" ")) {
    if (lines[lines.length - 1] && each * (lines[lines.length - 1].length + word.length + 1) > width) lines.push("");
    lines[lines.length - 1] += (lines[lines.length - 1] ? " " : "") + word;
  }
  return lines;
}

// A panel's title, on as many lines as it needs; gives where the panel goes on.
function panelTitle(root, words, width) {
  const lines = wrapped(words, width, 8.8);
  lines.forEach((line, i) => root.append(svg("text", {x: 0, y: 14 + 17 * i, class: "panel"}, line)));
  return 26 + 17 * (lines.length - 1);
}

// What names above the rows need beyond one line each.
const extraLines = (rows, width) => 16 * (Math.max(...rows.map((row) => wrapped(row.label, width, 7.1).length)) - 1);

// A row's name above its mark, its last line at y.
function nameAbove(root, label, y, width) {
  const lines = wrapped(label, width, 7.1);
  lines.forEach((line, i) => root.append(svg("text", {x: 0, y: y - 16 * (lines.length - 1 - i)}, line)));
}

function frame(width, label) {
  return svg("svg", {width, role: "img", "aria-label": label});
}

// How high a frame is, once that is known.
function high(root, height) {
  root.setAttribute("height", height);
  root.setAttribute("viewBox", `0 0 ${root.getAttribute("width")} ${height}`);
}

// Room for the rows' names beside their marks; 0 where that would take too much, and names stand above.
function labelWidth(rows, width) {
  const needed = 14 + 7.1 * Math.max(...rows.map((row) => row.label.length));
  return width < 520 || needed > 0.45 * width ? 0 : needed;
}

// Dots with whiskers, one row per label. rows: [{label, look, hollow, value, low, high} or without value]; `all` the rows of all the chart's panels.
function dotPanel(title, rows, width, all, unity) {
  const left = labelWidth(all, width), values = all.flatMap((row) => row.value === undefined ? [] : [row.low, row.high]);
  const step = left ? 30 : 46 + extraLines(all, width);
  const root = frame(width, title + ": " + rows.map((r) => r.label + " " + (r.value === undefined ? "not priced" : times(r.value))).join(", "));
  const top = panelTitle(root, title, width), bottom = top + step * rows.length;
  high(root, bottom + 24);
  const axis = logAxis(values, left + 14, width - 18);
  ratioGrid(root, axis, left ? [[top, bottom]] : rows.flatMap((row, i) => row.value === undefined ? [] : [[top + step * (i + 1) - 23, top + step * (i + 1)]]), bottom, unity);
  rows.forEach((row, i) => {
    const y = top + step * i + (left ? step / 2 : step - 13);
    if (left) root.append(svg("text", {x: 0, y: y + 4}, row.label)); else nameAbove(root, row.label, y - 14, width);
    if (row.value === undefined) {
      root.append(svg("text", {x: Math.min(axis.place(1) + 8, width - 110), y: y + 4, class: "tick"}, "not on this CPU"));
      return;
    }
    const group = svg("g", {}, svg("title", {}, `${row.label}: ${times(row.value)} (${times(row.low)} to ${times(row.high)})`));
    group.append(svg("line", {x1: axis.place(row.low), x2: axis.place(row.high), y1: y, y2: y, stroke: row.look.colour, "stroke-width": 1.8}));
    for (const end of [row.low, row.high]) group.append(svg("line", {x1: axis.place(end), x2: axis.place(end), y1: y - 4, y2: y + 4, stroke: row.look.colour, "stroke-width": 1.8}));
    group.append(marker(row.look, row.hollow, axis.place(row.value), y));
    const right = axis.place(row.high) < width - 70;
    group.append(svg("text", {
      x: right ? axis.place(row.high) + 9 : axis.place(row.low) - 9, y: y + 4, "text-anchor": right ? "start" : "end", class: "value",
    }, times(row.value)));
    root.append(group);
  });
  return root;
}

// Stacked bars on a linear axis. rows: [{label, parts: [[cause, cycles]], total} or without parts]; `all` the rows of all the chart's panels, which stand in line.
function stackPanel(rows, width, colours, unit, all) {
  const left = labelWidth(all, width), step = left ? 32 : 46 + extraLines(all, width), top = 4, bottom = top + step * rows.length;
  const most = Math.max(...rows.map((row) => row.total || 0)) * 1.0001 || 1;
  const root = frame(width, rows.map((row) => `${row.label}: ${row.parts ? cyclesText(row.total) + " " + unit : "not on this CPU"}`).join(", "));
  high(root, bottom + 22);
  const room = width - left - Math.max(74, 18 + 8.6 * Math.max(...all.map((row) => row.parts ? cyclesText(row.total).length : 0))), place = (value) => left + 8 + room * value / most;
  const step10 = 10 ** Math.floor(Math.log10(most)), every = most / step10 >= 5 ? 2 * step10 : most / step10 >= 2 ? step10 : step10 / 2;
  for (let tick = 0; tick <= most; tick += every) {
    for (const [from, to] of left ? [[top, bottom]] : rows.flatMap((row, i) => row.parts ? [[top + step * (i + 1) - 25, top + step * (i + 1)]] : [])) {
      root.append(svg("line", {x1: place(tick), x2: place(tick), y1: from, y2: to, stroke: "#d0d0d0", "stroke-width": 0.8}));
    }
    root.append(svg("text", {x: place(tick), y: bottom + 15, "text-anchor": "middle", class: "tick"}, Number(tick.toPrecision(3)).toLocaleString("en-US")));
  }
  rows.forEach((row, i) => {
    const height = left ? 21 : 18, y = top + step * i + (left ? (step - height) / 2 : step - height - 4);
    if (left) root.append(svg("text", {x: 0, y: y + height / 2 + 4}, row.label)); else nameAbove(root, row.label, y - 5, width);
    if (!row.parts) {
      root.append(svg("text", {x: left + 12, y: y + height / 2 + 4, class: "tick"}, "not on this CPU"));
      return;
    }
    let at = 0;
    for (const [cause, cycles] of row.parts) {
      root.append(svg("rect", {x: place(at), y, width: Math.max(0, place(at + cycles) - place(at)), height, fill: colours[cause] || "#8a8a8a", stroke: "#fff", "stroke-width": 0.7},
        svg("title", {}, `${row.label}, ${cause}: ${cyclesText(cycles)} ${unit}, ${Math.round(100 * cycles / row.total)} %`)));
      at += cycles;
    }
    root.append(svg("text", {x: place(at) + 6, y: y + height / 2 + 4, class: "value"}, cyclesText(row.total)));
  });
  return root;
}

// Lines through categories that go down the page (CPU generations), a log axis across.
// series: [{label, look, hollow, points: [[category number, value, low, high]], breaks: Set of categories that join nothing}]
function ladderPanel(title, categories, joined, series, width, all) {
  const left = Math.min(0.42 * width, 16 + 7 * Math.max(...categories.map((c) => c.length))), step = Math.max(24, 9 * series.length);
  const root = frame(width, title + ": slowdown of " + series.map((s) => s.label).join(", ") + " on " + categories.join(", "));
  const top = panelTitle(root, title, width), bottom = top + step * categories.length;
  high(root, bottom + 24);
  const axis = logAxis(all, left + 12, width - 18);
  ratioGrid(root, axis, [[top, bottom]], bottom);
  categories.forEach((name, i) => root.append(svg("text", {x: 0, y: top + step * (i + 0.5) + 4, class: joined[i] ? "" : "apart"}, name)));
  series.forEach((one, s) => {
    const shift = Math.min(6, step / (series.length + 1)) * (s - (series.length - 1) / 2);
    const at = ([category, value]) => [axis.place(value), top + step * (category + 0.5) + shift];
    const line = one.points.filter(([category]) => joined[category]).map(at);
    if (line.length > 1) root.append(svg("polyline", {
      points: line.map((p) => p.join(",")).join(" "), fill: "none", stroke: one.look.colour, "stroke-width": 1.5, ...(one.hollow ? {"stroke-dasharray": one.hollow > 1 ? "2 3" : "5 3"} : {}),
    }));
    for (const point of one.points) {
      const [x, y] = at(point), [category, value, low, high] = point;
      root.append(svg("g", {}, svg("title", {}, `${one.label}, ${categories[category]}: ${times(value)} (${times(low)} to ${times(high)})`),
        svg("line", {x1: axis.place(low), x2: axis.place(high), y1: y, y2: y, stroke: one.look.colour, "stroke-width": 1.2}), marker(one.look, one.hollow, x, y)));
    }
  });
  return root;
}

// Lines over a numeric axis (density), logarithmic both ways where it spans far.
function linePanel(title, across, series, width, all) {
  const xs = [...new Set(series.flatMap((one) => one.points.map((p) => p[0])))].sort((a, b) => a - b);
  const root = frame(width, title + ": " + series.map((s) => s.label + " " + s.points.map((p) => `${p[0]}: ${times(p[1])}`).join(", ")).join("; "));
  const top = panelTitle(root, title, width), height = Math.min(340, 0.75 * width + 60) + top - 26, left = 52, bottom = height - 44, wide = xs[0] > 0 && xs[xs.length - 1] / xs[0] >= 20;
  const scale = wide ? Math.log : (x) => x, from = scale(xs[0]), to = scale(xs[xs.length - 1]);
  const x = (value) => left + 22 + (width - left - 50) * (scale(value) - from) / ((to - from) || 1);
  const axis = logAxis(all, bottom, top);
  high(root, height);
  for (const tick of axis.ticks) {
    const y = axis.place(tick), one = tick === 1;
    root.append(svg("line", {x1: left, x2: width - 10, y1: y, y2: y, stroke: one ? "#1a1a1a" : "#d0d0d0", "stroke-width": one ? 1.4 : 0.8}));
    root.append(svg("text", {x: left - 6, y: y + 4, "text-anchor": "end", class: "tick"}, one ? "native" : tick + "×"));
  }
  for (const value of xs) root.append(svg("text", {x: x(value), y: bottom + 17, "text-anchor": "middle", class: "tick"}, String(value)));
  root.append(svg("text", {x: (left + width) / 2, y: height - 6, "text-anchor": "middle"}, across));
  series.forEach((one, s) => {
    const shift = 4 * (s - (series.length - 1) / 2), places = one.points.map((p) => [x(p[0]) + shift, axis.place(p[1])]);
    if (places.length > 1) root.append(svg("polyline", {
      points: places.map((p) => p.join(",")).join(" "), fill: "none", stroke: one.look.colour, "stroke-width": 1.5, ...(one.hollow ? {"stroke-dasharray": one.hollow > 1 ? "2 3" : "5 3"} : {}),
    }));
    one.points.forEach(([value, ratio, low, high], i) => root.append(svg("g", {}, svg("title", {}, `${one.label} at ${value}: ${times(ratio)} (${times(low)} to ${times(high)})`),
      svg("line", {x1: places[i][0], x2: places[i][0], y1: axis.place(low), y2: axis.place(high), stroke: one.look.colour, "stroke-width": 1.2}), marker(one.look, one.hollow, ...places[i]))));
  });
  return root;
}

// Operations beside published figures, a log axis of cycles across: filled ours, hollow published, an upright line ours on the chosen CPU.
// table.rows: [{words, note, figures: [{system, look, ours: {value, low, high} or null, here, published, calibrated}]}]
function operationsPanel(title, table, cpu, width) {
  const left = width < 520 ? 0 : 8 + Math.min(0.34 * width, 7.2 * Math.max(...table.rows.map((row) => row.words.length))), line = 17, lead = left ? 6 : 22, right = 54;
  const heights = table.rows.map((row) => lead + line * row.figures.length + 4);
  const all = table.rows.flatMap((row) => row.figures.flatMap((f) => [f.published, f.here, f.ours && f.ours.value, f.ours && f.ours.high].filter((v) => v > 0)));
  const from = Math.log10(Math.min(...all) / 1.5), to = Math.log10(Math.max(...all) * 1.5), room = width - left - right - 16;
  const x = (v) => left + 8 + room * (Math.log10(v) - from) / (to - from), every = Math.ceil(52 / (room / (to - from)));
  const said = table.rows.map((row) => row.words + ": " + row.figures.map((f) => `${table.systems[f.system][0]} ${f.ours ? cyclesText(f.ours.value) : "not run"}${f.published ? ", published " + cyclesText(f.published) : ""}`).join(", "));
  const root = frame(width, `${title}. ${said.join("; ")}`);
  const top = panelTitle(root, title, width) + 4, bottom = top + heights.reduce((a, b) => a + b, 0);
  high(root, bottom + 22);
  for (let power = Math.ceil(from); power <= to; power += every) {
    const at = x(10 ** power);
    root.append(svg("line", {x1: at, x2: at, y1: top, y2: bottom, stroke: "#d0d0d0", "stroke-width": 0.8}));
    root.append(svg("text", {x: at, y: bottom + 15, "text-anchor": "middle", class: "tick"}, power >= 6 ? 10 ** (power - 6) + " M" : (10 ** power).toLocaleString("en-US")));
  }
  let y = top;
  table.rows.forEach((row, i) => {
    root.append(svg("line", {x1: 0, x2: width, y1: y, y2: y, stroke: "#d0d0d0", "stroke-width": 0.8}));
    root.append(svg("text", left ? {x: 0, y: y + heights[i] / 2 + 4} : {x: 0, y: y + 15}, row.words));
    row.figures.forEach((f, j) => {
      const at = y + lead + line * (j + 0.5), system = table.systems[f.system][0], group = svg("g", {});
      const words = [`${row.words}, ${system}: ${f.ours ? cyclesText(f.ours.value) + " cycles" : "not run, or not on this CPU"}`, ...(f.published ? ["published " + cyclesText(f.published)] : []),
        ...(f.here ? [cyclesText(f.here) + " on " + cpu] : []), ...(f.calibrated && f.ours ? ["a cost was set by this figure"] : []), ...(row.note ? [row.note] : [])];
      group.append(svg("title", {}, words.join("; ")));
      if (f.published) {
        const ring = marker(f.look, 1, x(f.published), at);
        ring.setAttribute("transform", ring.getAttribute("transform") + " scale(1.3)");
        group.append(ring);
      }
      if (f.ours && f.ours.value > 0) {
        group.append(svg("line", {x1: Math.max(left, x(Math.max(f.ours.low, f.ours.value / 1000))), x2: x(f.ours.high), y1: at, y2: at, stroke: f.look.colour, "stroke-width": 1.8}), marker(f.look, 0, x(f.ours.value), at));
      }
      if (f.here > 0) group.append(svg("line", {x1: x(f.here), x2: x(f.here), y1: at - 7, y2: at + 7, stroke: f.look.colour, "stroke-width": 2.4}));
      if (f.ours && f.published) group.append(svg("text", {x: width - 2, y: at + 4, "text-anchor": "end", class: "tick"}, shareText(f.ours.value / f.published) + (f.calibrated ? " *" : "")));
      root.append(group);
    });
    y += heights[i];
  });
  return root;
}

// How counts grow, over a logarithmic axis. points: [[across, first, second]], a line for each of `names`.
function growthPanel(title, across, names, points, colour, width) {
  const root = frame(width, `${title}: ${names.map((name, i) => `${name} ${points[points.length - 1][i + 1]}`).join(", ")} by ${points[points.length - 1][0]} ${across}`);
  const top = panelTitle(root, title, width), bottom = top + 150, left = 56, most = 1.25 * Math.max(...points.flatMap((p) => p.slice(1)), 1);
  high(root, bottom + 40);
  const from = Math.log10(Math.max(1, points[0][0])), to = Math.log10(points[points.length - 1][0]), x = (v) => left + (width - left - 20) * (Math.log10(Math.max(1, v)) - from) / ((to - from) || 1);
  const y = (v) => bottom - (bottom - top) * v / most, step10 = 10 ** Math.floor(Math.log10(most)), every = most / step10 >= 5 ? 2 * step10 : most / step10 >= 2 ? step10 : step10 / 2;
  for (let tick = 0; tick <= most; tick += every) {
    root.append(svg("line", {x1: left, x2: width - 20, y1: y(tick), y2: y(tick), stroke: "#d0d0d0", "stroke-width": 0.8}));
    root.append(svg("text", {x: left - 6, y: y(tick) + 4, "text-anchor": "end", class: "tick"}, Number(tick.toPrecision(3)).toLocaleString("en-US")));
  }
  for (let power = Math.ceil(from); power <= to; power++) root.append(svg("text", {x: Math.min(x(10 ** power), width - 26), y: bottom + 16, "text-anchor": "middle", class: "tick"}, (10 ** power).toLocaleString("en-US")));
  root.append(svg("text", {x: (left + width) / 2, y: bottom + 34, "text-anchor": "middle"}, across));
  names.forEach((name, i) => {
    const line = {fill: "none", stroke: colour, "stroke-width": 1.8, ...(i ? {"stroke-dasharray": "5 3"} : {})}, at = top + 14 + 18 * i;
    root.append(svg("polyline", {points: points.map((p) => `${x(p[0])},${y(p[i + 1])}`).join(" "), ...line}));
    root.append(svg("polyline", {points: `${left + 8},${at} ${left + 34},${at}`, ...line}), svg("text", {x: left + 40, y: at + 4}, name));
  });
  return root;
}

// Keys to markers or colours, as a list that a screen reader can read.
function legend(items) {
  return html("ul", {class: "legend"}, ...items.map((item) => {
    const sign = svg("svg", {width: 18, height: 16, viewBox: "-9 -8 18 16", "aria-hidden": "true"});
    sign.append(item.look ? marker(item.look, item.hollow, 0, 0) : svg("rect", {x: -7, y: -6, width: 14, height: 12, fill: item.colour}));
    return html("li", {}, sign, " " + item.label);
  }));
}

// The same figures as a table. rows: lists of fields, the first one the row's head.
function figuresTable(head, rows) {
  const number = (field) => typeof field === "string" && /^[-\d]/.test(field);
  return html("table", {},
    html("thead", {}, html("tr", {}, ...head.map((name) => html("th", {scope: "col"}, name)))),
    html("tbody", {}, ...rows.map((row) => html("tr", {}, ...row.map((field, i) => i ? html("td", number(field) ? {class: "number"} : {}, field) : html("th", {scope: "row"}, field))))));
}
