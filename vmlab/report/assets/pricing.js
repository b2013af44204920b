// Pricing in the page: the dot product of counts and unit costs that vmlab/costs does in Python, on the same figures,
// the same samples, in the same order of summing. tests/test_report_live.py holds the two together.
"use strict";

// MT19937 seeded with a list of 32-bit words, as Python's random.Random does (Matsumoto & Nishimura, init_by_array).
function mersenne(words) {
  const n = 624, m = 397, mt = new Uint32Array(n);
  mt[0] = 19650218;
  for (let i = 1; i < n; i++) mt[i] = Math.imul(1812433253, mt[i - 1] ^ (mt[i - 1] >>> 30)) + i;
  let i = 1, j = 0;
  for (let k = Math.max(n, words.length); k; k--) {
    mt[i] = (mt[i] ^ Math.imul(mt[i - 1] ^ (mt[i - 1] >>> 30), 1664525)) + words[j] + j;
    if (++i >= n) { mt[0] = mt[n - 1]; i = 1; }
    if (++j >= words.length) j = 0;
  }
  for (let k = n - 1; k; k--) {
    mt[i] = (mt[i] ^ Math.imul(mt[i - 1] ^ (mt[i - 1] >>> 30), 1566083941)) - i;
    if (++i >= n) { mt[0] = mt[n - 1]; i = 1; }
  }
  mt[0] = 0x80000000;
  let at = n;
  function next() {
    if (at >= n) {
      for (let k = 0; k < n; k++) {
        const y = (mt[k] & 0x80000000) | (mt[(k + 1) % n] & 0x7fffffff);
        mt[k] = mt[(k + m) % n] ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
      }
      at = 0;
    }
    let y = mt[at++];
    y ^= y >>> 11; y ^= (y << 7) & 0x9d2c5680; y ^= (y << 15) & 0xefc60000; y ^= y >>> 18;
    return y >>> 0;
  }
  return () => ((next() >>> 5) * 67108864 + (next() >>> 6)) / 9007199254740992;
}

// The order in which a figure's quantiles are drawn: `seed` is base64 of the bytes that Python seeds with, as one big-endian number.
function drawOrder(seed, count) {
  const bytes = Uint8Array.from(atob(seed), (c) => c.charCodeAt(0)), words = [];
  for (let end = bytes.length; end > 0; end -= 4) {
    let word = 0;
    for (let i = Math.max(0, end - 4); i < end; i++) word = word * 256 + bytes[i];
    words.push(word);
  }
  const random = mersenne(words), draws = Array.from({length: count}, random);
  return draws.map((_, i) => i).sort((a, b) => draws[a] - draws[b] || a - b);
}

class NoFigure extends Error {}

// One profile with some costs held at values of the reader's own (`override`: key -> value).
class CostModel {
  constructor(data, name, override) {
    this.data = data;
    this.name = name;
    this.profile = data.profiles[name];
    this.override = override || {};
    this.units = new Map();
    this.vectors = new Map();
    this.sampled = new Map();
  }

  // As Profile.figure: the key itself, else its family's default; the reader's value, the profile's, the shared table's.
  figure(key) {
    const family = key.split(".")[0];
    const names = family === "insn" || family === "exit" ? [key, family + ".default"] : [key];
    for (const name of names) {
      if (Object.hasOwn(this.override, name)) {
        const value = this.override[name];
        return {key: name, value, low: value, high: value};
      }
      for (const table of [this.profile.figures, this.data.shared]) {
        if (Object.hasOwn(table, name)) {
          const [value, low, high] = table[name];
          return {key: name, value, low, high, seed: table[name][5]};
        }
      }
    }
    throw new NoFigure("no figure for " + key);
  }

  instruction() {
    return this.data.mix.reduce((sum, [name, share]) => sum + share * this.figure("class." + name).value, 0);
  }

  factor(key) {
    if (key.startsWith("path.")) return this.instruction();
    return key.startsWith("shared.") ? this.figure("mhz").value / 1000 : 1;
  }

  unit(kind) {
    if (!this.units.has(kind)) {
      let sum = 0;
      for (const [factor, key] of this.data.rules[kind][1]) {
        const figure = this.figure(key);
        sum += factor * figure.value * this.factor(figure.key);
      }
      this.units.set(kind, sum);
    }
    return this.units.get(kind);
  }

  samples(figure) {
    const id = figure.key;
    if (!this.sampled.has(id)) {
      const count = this.data.quantiles.length, made = new Float64Array(count);
      if (figure.low === figure.high) made.fill(figure.value);
      else {
        const below = Math.log(figure.value / figure.low), above = Math.log(figure.high / figure.value);
        const order = CostModel.orders.get(figure.seed) || drawOrder(figure.seed, count);
        CostModel.orders.set(figure.seed, order);
        order.forEach((rank, i) => {
          const z = this.data.quantiles[rank];
          made[i] = figure.value * Math.exp(z * (z < 0 ? below : above));
        });
      }
      this.sampled.set(id, made);
    }
    return this.sampled.get(id);
  }

  sampledFactor(key) {
    const family = key.split(".")[0], id = "factor of " + family;
    if (family !== "path" && family !== "shared") return null;
    if (!this.sampled.has(id)) {
      if (family === "shared") this.sampled.set(id, this.samples(this.figure("mhz")).map((mhz) => mhz / 1000));
      else {
        const mixed = new Float64Array(this.data.quantiles.length);
        for (const [name, share] of this.data.mix) {
          this.samples(this.figure("class." + name)).forEach((value, i) => { mixed[i] += share * value; });
        }
        this.sampled.set(id, mixed);
      }
    }
    return this.sampled.get(id);
  }

  vector(kind) {
    if (!this.vectors.has(kind)) {
      const total = new Float64Array(this.data.quantiles.length);
      for (const [factor, key] of this.data.rules[kind][1]) {
        const figure = this.figure(key), scale = this.sampledFactor(figure.key);
        this.samples(figure).forEach((value, i) => { total[i] += factor * (scale ? value * scale[i] : value); });
      }
      this.vectors.set(kind, total);
    }
    return this.vectors.get(kind);
  }

  // Cycles of one cost key, nominal and under each sample.
  cost(key) {
    const figure = this.figure(key);
    return figure.value * this.factor(figure.key);
  }

  costVector(key) {
    const figure = this.figure(key), scale = this.sampledFactor(figure.key), values = this.samples(figure);
    return scale ? values.map((value, i) => value * scale[i]) : values;
  }

  // Why this CPU has no price for these counts, or null.
  refusal(counts, platform) {
    if (!this.data.platforms[platform].every((oneOf) => oneOf.some((needed) => this.profile.provides.includes(needed)))) {
      return this.name + " does not provide what the run needs";
    }
    for (const [kind] of counts) {
      try { this.unit(kind); } catch (lacking) {
        if (!(lacking instanceof NoFigure)) throw lacking;
        return this.name + ": " + lacking.message;
      }
    }
    return null;
  }

  breakdown(counts) {
    const causes = new Map(this.data.causes.map((cause) => [cause, 0]));
    const add = (cause, cycles) => causes.set(cause, causes.get(cause) + cycles);
    let calls = 0;
    for (const [kind, count] of counts) if (kind.startsWith("hypercall.")) calls += count;
    const gate = counts.some(([kind]) => kind === "trap.syscall") ? "trap.syscall" : "trap.int";
    for (let [kind, count] of counts) {
      if (kind === gate && calls) { // a hypercall's transition is shown with the hypercalls
        const throughGate = Math.min(count, calls);
        add("hypercalls", throughGate * this.unit(kind));
        count -= throughGate;
      }
      add(this.data.rules[kind][0], count * this.unit(kind));
    }
    return [...causes].filter(([, cycles]) => cycles);
  }

  nominal(counts) {
    return this.breakdown(counts).reduce((sum, [, cycles]) => sum + cycles, 0);
  }

  totals(counts) {
    const totals = new Float64Array(this.data.quantiles.length);
    for (const [kind, count] of counts) this.vector(kind).forEach((unit, i) => { totals[i] += count * unit; });
    return totals;
  }

  price(counts, platform) {
    if (this.refusal(counts, platform)) return null;
    const breakdown = this.breakdown(counts), total = breakdown.reduce((sum, [, cycles]) => sum + cycles, 0);
    const [low, high] = percentiles(this.totals(counts));
    return {total, low: Math.min(low, total), high: Math.max(high, total), breakdown: Object.fromEntries(breakdown)};
  }

  slowdown(counts, platform, base, basePlatform) {
    if (!base.length || this.refusal(counts, platform) || this.refusal(base, basePlatform)) return null;
    const value = this.nominal(counts) / this.nominal(base), under = this.totals(base);
    const [low, high] = percentiles(this.totals(counts).map((total, i) => total / under[i]));
    return {value, low: Math.min(low, value), high: Math.max(high, value)};
  }
}
CostModel.orders = new Map();

// 5th and 95th percentile, nearest rank.
function percentiles(totals) {
  const ordered = Float64Array.from(totals).sort();
  return [ordered[Math.trunc(0.05 * ordered.length)], ordered[Math.min(ordered.length - 1, Math.trunc(0.95 * ordered.length))]];
}

// Counts as they stand in the page, [number of kind, count, ...], as [kind, count] pairs of the kinds that have a price.
function pricedCounts(data, flat) {
  const pairs = [];
  for (let i = 0; i < flat.length; i += 2) {
    const kind = data.kinds[flat[i]];
    if (Object.hasOwn(data.rules, kind)) pairs.push([kind, flat[i + 1]]);
  }
  return pairs;
}

if (typeof module !== "undefined") module.exports = {CostModel, NoFigure, pricedCounts, percentiles, mersenne};
