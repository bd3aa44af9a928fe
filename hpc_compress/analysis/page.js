"use strict";
// Draws the figures of the page and names the model within the reader's limits. All texts of a run are data: they are shown by
// textContent, or escaped for Plotly, which reads some tags in its titles.
const COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"];
const SYMBOLS = ["circle", "triangle-up", "diamond", "triangle-down", "cross", "x"];
const runs = JSON.parse(document.getElementById("data").textContent);
const articles = [...document.querySelectorAll("article.run")];
const escaped = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const quality = (point) => point.quality.toFixed(3) + (point.error === null ? "" : " ± " + point.error.toFixed(3));

// --- what a point is ---

const tip = document.body.appendChild(Object.assign(document.createElement("div"), { className: "tip", hidden: true }));

function about(run, place) {
  const point = run.points[place], line = [];
  for (let at = place; at >= 0 && line.length < 50; at = run.points[at].parent) line.unshift(run.points[at].added || "base model");
  return [
    point.id,
    `${run.metric} ${quality(point)} on the search split` + (point.report === null ? "" : `, ${point.report.toFixed(3)} on the report split`),
    `${point.speed.toFixed(2)}x as fast, ${point.mb.toFixed(1)} MB, deployed as ${point.deploy}`,
    ...(point.heads ? [`heads ${point.heads}`, `FFN ${point.ffn}`] : []),
    `generation ${point.generation}: ${line.join(" → ")}`,
  ].join("\n");
}

function explain(plot, run) {
  plot.on("plotly_hover", ({ points, event }) => {
    tip.textContent = about(run, points[0].customdata);
    tip.hidden = false;
    const place = event ?? plot.getBoundingClientRect(), x = place.clientX ?? place.left, y = place.clientY ?? place.top;
    tip.style.left = Math.max(6, Math.min(x + 14, document.documentElement.clientWidth - tip.offsetWidth - 6)) + "px";
    tip.style.top = (y + 18 + tip.offsetHeight < innerHeight ? y + 18 : Math.max(6, y - tip.offsetHeight - 14)) + "px";
  });
  plot.on("plotly_unhover", () => (tip.hidden = true));
}

// --- views ---

function axis(title, values, log) {
  const found = values.filter((value) => value > 0);
  const wide = log && found.length && Math.max(...found) > 8 * Math.min(...found);
  const ticks = wide ? { type: "log", tickvals: [0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024] } : {};
  return { title: { text: title, standoff: 8, font: { size: 13 } }, automargin: true, zeroline: false, gridcolor: "#e6eaee", ...ticks };
}

function draw(element, traces, x, y, more = {}) {
  const layout = { showlegend: false, hovermode: "closest", margin: { l: 56, r: 14, t: 10, b: 48 }, xaxis: x, yaxis: y, font: { size: 12, color: "#1b1f24" }, hoverlabel: { align: "left" }, ...more };
  return Plotly.newPlot(element, traces, layout, { responsive: true, displayModeBar: false });
}

function views(run, article) {
  const points = run.points, places = points.map((_, place) => place);
  const figures = {
    quality: { title: escaped(run.metric) + " on the search split", of: (point) => point.quality },
    speed: { title: "speed-up over the base model, times", of: (point) => point.speed, log: true },
    mb: { title: "size of the saved model, MB", of: (point) => point.mb, log: true },
  };
  const groups = [
    [places.filter((place) => points[place].kind === "candidate" && !points[place].front), { size: 7, color: "#8a929a", symbol: "circle-open" }],
    [places.filter((place) => points[place].kind === "candidate" && points[place].front), { size: 9, color: COLORS[0] }],
    [places.filter((place) => points[place].kind === "baseline"), { size: 10, color: COLORS[3], symbol: "diamond" }],
    [places.filter((place) => points[place].kind === "base"), { size: 10, color: "#000", symbol: "square" }],
  ];
  [["speed", "quality"], ["mb", "quality"], ["speed", "mb"]].forEach(([x, y], number) => {
    const trace = (chosen, marker) => ({
      type: "scatter", mode: "markers", marker, cliponaxis: false,
      x: chosen.map((place) => figures[x].of(points[place])), y: chosen.map((place) => figures[y].of(points[place])),
      customdata: chosen, hoverinfo: "none",
      error_y: { visible: y === "quality" && chosen.some((place) => points[place].error !== null), array: chosen.map((place) => points[place].error || 0), thickness: 1, width: 2, color: marker.color },
    });
    const traces = groups.map(([chosen, marker]) => trace(chosen, marker));
    traces.push({ type: "scatter", mode: "markers", hoverinfo: "skip", x: [], y: [], marker: { size: 17, color: "rgba(0,0,0,0)", line: { color: COLORS[1], width: 2.5 } } });
    const axes = [x, y].map((name) => axis(figures[name].title, points.map(figures[name].of), figures[name].log));
    const plot = article.querySelector(".view" + number);
    draw(plot, traces, axes[0], axes[1]);
    explain(plot, run);
  });
}

// --- limits ---

function limits(run, article) {
  const inputs = { mb: article.querySelector(".limit.mb"), speed: article.querySelector(".limit.speed"), quality: article.querySelector(".limit.quality") };
  const by = article.querySelector(".by"), taken = article.querySelector(".taken"), points = run.points;
  const of = { mb: (point) => point.mb, speed: (point) => point.speed, quality: (point) => point.kept };
  const loosest = { mb: 1, speed: -1, quality: -1 };
  for (const [name, input] of Object.entries(inputs)) {
    const values = points.map(of[name]), wanted = run.limits[name];
    input.step = name === "speed" ? 0.05 : 0.1;
    input.min = Math.floor(10 * Math.min(...values, wanted ?? Infinity)) / 10;
    input.max = Math.ceil(10 * Math.max(...values, wanted ?? -Infinity)) / 10;
    input.value = wanted ?? (loosest[name] > 0 ? input.max : input.min);
    input.addEventListener("input", update);
  }
  if (!points.some((point) => point.fitness !== null)) by.querySelector("[value=fitness]").remove();
  by.value = run.by;
  by.addEventListener("change", update);
  const score = { fitness: (p) => p.fitness ?? -1, compromise: (p) => p.compromise, quality: (p) => p.quality, speed: (p) => p.speed, mb: (p) => -p.mb };

  function update() {
    const limit = {};
    for (const [name, input] of Object.entries(inputs)) {
      limit[name] = Number(input.value);
      input.closest("label").querySelector("output").textContent = limit[name].toFixed(name === "speed" ? 2 : 1);
    }
    const slack = 1e-9, within = points.filter((p) => p.mb <= limit.mb + slack && p.speed >= limit.speed - slack && p.kept >= limit.quality - slack);
    const rank = score[by.value];
    const best = within.reduce((one, other) => (one === null || rank(other) > rank(one) || (rank(other) === rank(one) && other.quality > one.quality) ? other : one), null);
    taken.dataset.candidate = best ? best.id : "";
    taken.textContent = best
      ? `Take ${best.id}: ${run.metric} ${quality(best)} (${best.kept.toFixed(1)} % of the base model's), ${best.speed.toFixed(2)}x, ${best.mb.toFixed(1)} MB; ` +
        `${within.length} of ${points.length} measured models are within the limits. hpc-compress export ${run.folder} model/ --candidate ${best.id}`
      : "No measured model keeps to all of these limits; move one of them.";
    ring(best);
  }

  function ring(best) {
    [["speed", "quality"], ["mb", "quality"], ["speed", "mb"]].forEach(([x, y], number) => {
      const plot = article.querySelector(".view" + number), value = { quality: (p) => p.quality, speed: (p) => p.speed, mb: (p) => p.mb };
      Plotly.restyle(plot, { x: [best ? [value[x](best)] : []], y: [best ? [value[y](best)] : []] }, [4]);
    });
  }

  update();
}

// --- progress ---

function curve(run, number) {
  const { seconds, hypervolume, measured } = run.progress;
  return {
    type: "scatter", mode: "lines+markers", name: escaped(run.name), x: seconds, y: hypervolume, line: { shape: "hv", color: COLORS[number % 6] },
    marker: { symbol: SYMBOLS[number % 6], size: 7 }, hovertemplate: "%{x:.0f} s: %{y:.3f}<br>%{text} candidates measured<extra></extra>", text: measured.map(String),
  };
}

function progress(element, chosen) {
  const x = axis("device seconds, summed over jobs", [], false), y = { ...axis("hypervolume on the search split", [], false), rangemode: "tozero" };
  const legend = { showlegend: chosen.length > 1, legend: { orientation: "h", y: -0.28, yanchor: "top" } };
  draw(element, chosen.map(curve), x, y, legend);
}

// --- the page ---

const drawn = new Set();
function show(number) {
  articles.forEach((article, place) => (article.hidden = place !== number));
  if (drawn.has(number) || !runs[number].points.length) return;
  drawn.add(number);
  views(runs[number], articles[number]);
  limits(runs[number], articles[number]);
  progress(articles[number].querySelector(".progress"), [runs[number]]);
}

const pick = document.querySelector(".pick"), together = document.querySelector(".all-progress");
if (together) progress(together, runs);
if (pick) pick.addEventListener("change", () => show(Number(pick.value)));
for (const form of document.forms) form.addEventListener("submit", (event) => event.preventDefault());
show(pick ? Number(pick.value) : 0);
