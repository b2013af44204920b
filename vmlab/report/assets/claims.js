// Verdicts in the page: a priced claim hangs on margins, forms in counts and costs that must not be negative
// (vmlab/claims/evidence.py: Margins); here they are judged again at the reader's costs. tests/test_report_live.py holds the two together.
"use strict";

// A margin's value at nominal costs, or under each sample of them. `of(name)` gives a profile's CostModel.
function marginValue(form, model, of) {
  let sum = form.constant;
  for (const [kind, weight] of Object.entries(form.events)) sum += weight * model.unit(kind);
  for (const [key, weight] of Object.entries(form.costs)) sum += weight * model.cost(key);
  if (form.other) {
    const [name, costs, factor] = form.other, there = of(name);
    for (const [key, weight] of Object.entries(costs)) sum += factor * weight * there.cost(key);
  }
  return sum;
}

function marginSamples(form, model) {
  const totals = new Float64Array(model.data.quantiles.length).fill(form.constant);
  for (const [kind, weight] of Object.entries(form.events)) model.vector(kind).forEach((unit, i) => { totals[i] += weight * unit; });
  for (const [key, weight] of Object.entries(form.costs)) model.costVector(key).forEach((unit, i) => { totals[i] += weight * unit; });
  return totals;
}

// The verdict on one profile, and the share of the cost samples that agree with the nominal one.
function judgeProfile(set, model, of) {
  const wanted = set.enough === null ? set.of.length : set.enough;
  const holds = set.of.filter((form) => marginValue(form, model, of) >= 0).length >= wanted;
  if (!set.certainty) return {verdict: holds ? "holds" : "fails", agree: null};
  const held = new Uint16Array(model.data.quantiles.length);
  for (const form of set.of) marginSamples(form, model).forEach((value, i) => { held[i] += value >= 0; });
  const agree = held.reduce((sum, n) => sum + ((n >= wanted) === holds), 0) / held.length;
  return {verdict: agree < set.certainty ? "undecided" : holds ? "holds" : "fails", agree};
}

// The verdict at these models' costs; null for a claim that no price enters. A profile without evidence stays as it was.
function judge(claim, of) {
  if (!claim.margins) return null;
  const byProfile = {...claim.by_profile}, said = [];
  for (const [name, number] of Object.entries(claim.on)) {
    const found = judgeProfile(claim.margins[number], of(name), of);
    byProfile[name] = found.verdict;
    if (found.agree !== null && claim.scope.includes(name)) said.push(`${name}: ${Math.round(100 * found.agree)} % of the cost samples agree`);
  }
  const scope = claim.scope.map((name) => byProfile[name] || "undecided");
  const verdict = scope.includes("fails") ? "fails" : scope.length && scope.every((one) => one === "holds") ? "holds" : "undecided";
  return {verdict, byProfile, reason: said.join("; ") || "judged at your costs"};
}

if (typeof module !== "undefined") module.exports = {judge, judgeProfile};
