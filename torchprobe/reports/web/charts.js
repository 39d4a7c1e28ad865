// Charts of a run, drawn by Plotly. Labels come from a run's files: they are text, never markup.
"use strict";
var torchprobe = window.torchprobe || {};
window.torchprobe = torchprobe;

torchprobe.charts = (() => {
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer;
  const floats = (text) => new Float32Array(bytes(text));
  const ints = (text) => new Int32Array(bytes(text));
  // Plotly reads a few elements in labels: these are none.
  const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const brief = (text, most = 26) => (text.length > most ? "…" + text.slice(1 - most) : text);
  const number = (x) => (Number.isFinite(x) ? String(Number(x.toPrecision(4))) : x === null ? "–" : Number.isNaN(x) ? "NaN" : String(x));
  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

  /** Place of the last of increasing steps that is not after `step`; 0 where all are. */
  function at(steps, step) {
    let low = 0, high = steps.length - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (steps[middle] <= step) low = middle; else high = middle - 1;
    }
    return low;
  }

  /** Exponential moving average with TensorBoard's correction of its beginning; gaps stay. */
  function smoothed(values, weight) {
    let sum = 0, count = 0;
    return Array.from(values, (value) => {
      if (!Number.isFinite(value)) return null;
      sum = weight * sum + (1 - weight) * value;
      count += 1;
      return sum / (1 - weight ** count);
    });
  }

  function layout(more) {
    const axis = { gridcolor: color("line"), zerolinecolor: color("line"), linecolor: color("line"), automargin: true };
    const base = {
      font: { family: "system-ui, sans-serif", size: 11, color: color("ink") },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false,
      margin: { l: 48, r: 12, t: 8, b: 30 }, hovermode: "closest",
      modebar: { bgcolor: "rgba(0,0,0,0)", color: color("soft"), activecolor: color("accent") },
      hoverlabel: { bgcolor: color("card"), bordercolor: color("line"), font: { color: color("ink"), size: 12 } },
      ...more,
    };
    base.xaxis = { ...axis, ...(more.xaxis || {}) };
    base.yaxis = { ...axis, ...(more.yaxis || {}) };
    return base;
  }

  const line = (at, style) => ({ type: "line", xref: "x", yref: "paper", x0: at, x1: at, y0: 0, y1: 1, ...style });
  const config = { displaylogo: false, responsive: true, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d", "toImage"] };
  const range = (values) => values.reduce(([low, high], x) => [Math.min(low, x), Math.max(high, x)], [Infinity, -Infinity]);
  const marks = (alerts) => alerts.map((a) => line(a.step, { line: { color: color("bad"), width: 1, dash: "dot" }, opacity: 0.55 }));

  /** Curves of one name (training and validation) over steps, NaN and alerts marked on them. */
  function curve(element, parts, alerts, state) {
    const colors = [color("accent"), color("second")];
    const traces = [];
    parts.forEach((part, i) => {
      const label = plain(part.tag), steps = Array.from(part.steps), values = Array.from(part.values);
      const few = values.length < 20 ? "lines+markers" : "lines";
      const drawn = (y, more) => traces.push({ x: steps, y, name: label, mode: few, marker: { size: 4 }, hovertemplate: `%{y:.5g}<extra>${label} at step %{x}</extra>`, line: { color: colors[i % 2], width: 1.6 }, ...more });
      const finite = values.map((v) => (Number.isFinite(v) ? v : null));
      if (state.smoothing > 0) {
        drawn(finite, { opacity: 0.25, hoverinfo: "skip", hovertemplate: null });
        drawn(smoothed(values, state.smoothing));
      } else drawn(finite);
      const lost = steps.filter((_, k) => !Number.isFinite(values[k]));
      if (lost.length) {
        const level = lost.map((step) => lastFinite(part, step));
        traces.push({ x: lost, y: level, mode: "markers", name: "NaN or inf", marker: { symbol: "x", size: 7, color: color("bad") }, hovertemplate: `NaN or inf<extra>${label} at step %{x}</extra>` });
      }
    });
    const main = parts[0];
    if (alerts.length) {
      traces.push({
        x: alerts.map((a) => a.step), y: alerts.map((a) => lastFinite(main, a.step)), mode: "markers", name: "alerts",
        marker: { symbol: "diamond", size: 8, color: color("bad"), line: { color: color("card"), width: 1 } },
        text: alerts.map((a) => plain(`${a.name}${a.where ? " at " + a.where : ""}`)), hovertemplate: "%{text}<extra>alert at step %{x}</extra>",
      });
    }
    const shape = layout({ xaxis: { title: { text: "step", standoff: 4 } }, yaxis: { type: state.log ? "log" : "linear", exponentformat: "power" }, uirevision: `${state.log}`, shapes: marks(alerts) });
    return Plotly.react(element, traces, shape, config);
  }

  function lastFinite(part, step) {
    for (let i = at(part.steps, step); i >= 0; i--) if (Number.isFinite(part.values[i])) return part.values[i];
    return part.values.find(Number.isFinite) ?? 0;
  }

  const beside = (names) => ({ l: 18 + 6.4 * Math.max(...names.map((name) => Math.min(name.length, 26))), r: 12, t: 8, b: 34 });
  const ticks = (names, most = 40) => {
    const every = Math.ceil(names.length / most);
    const shown = names.map((_, i) => i).filter((i) => i % every === 0);
    return { tickvals: shown, ticktext: shown.map((i) => plain(brief(names[i]))) };
  };

  /** Layers down, steps across. Exact zeros and NaN have colours of their own, since no scale has room for them. */
  function heat(element, view, alerts) {
    const [rows, columns] = view.shape;
    const shown = [], raw = [], zeros = [], lost = [];
    let anyZero = false, anyLost = false;
    for (let i = 0; i < rows; i++) {
      const part = Array.from(view.values.subarray(i * columns, (i + 1) * columns));
      raw.push(part.map((v) => number(v)));
      shown.push(part.map((v) => (!Number.isFinite(v) || (view.log && v <= 0) ? null : view.log ? Math.log10(v) : v)));
      zeros.push(part.map((v) => (view.log && v === 0 ? 1 : null)));
      lost.push(part.map((v) => (v === Infinity ? 1 : null)));
      anyZero ||= zeros[i].includes(1);
      anyLost ||= lost[i].includes(1);
    }
    const x = Array.from(view.steps), y = view.layers.map((_, i) => i);
    const names = view.layers.map((name) => x.map(() => plain(name)));
    const hover = "%{text}<br>step %{x}: <b>%{customdata}</b><extra></extra>";
    const flat = (z, shade) => ({ type: "heatmap", x, y, z, text: names, customdata: raw, hovertemplate: hover, showscale: false, colorscale: [[0, shade], [1, shade]], zmin: 0, zmax: 1 });
    const traces = [{ type: "heatmap", x, y, z: shown, text: names, customdata: raw, hovertemplate: hover, colorscale: "Viridis", colorbar: scale(view.log ? "log10" : "") }];
    if (anyZero) traces.push(flat(zeros, color("zero")));
    if (anyLost) traces.push(flat(lost, color("bad")));
    return Plotly.react(element, traces, layout({ margin: beside(view.layers), xaxis: { title: { text: "step", standoff: 4 }, automargin: false }, yaxis: { range: [rows - 0.5, -0.5], showgrid: false, automargin: false, ...ticks(view.layers) }, uirevision: "kept", shapes: marks(alerts) }), config);
  }

  const scale = (title) => ({ thickness: 10, outlinewidth: 0, title: { text: title, side: "top" }, tickfont: { size: 10 } });

  /** One number for each layer at a step, over the range that it has in the whole run. */
  function flow(element, view, state) {
    const [rows, columns] = view.shape, column = at(view.steps, state.step);
    const of = (i) => Array.from(view.values.subarray(i * columns, (i + 1) * columns)).filter((v) => Number.isFinite(v) && (!view.log || v > 0));
    const x = view.layers.map((_, i) => i), ranges = (view.ranges ||= x.map((i) => range(of(i))));
    const now = x.map((i) => view.values[i * columns + column]);
    const seen = now.map((v) => (Number.isFinite(v) && (!view.log || v > 0) ? v : null));
    const odd = x.filter((i) => seen[i] === null && !Number.isNaN(now[i]));
    const text = view.layers.map((name, i) => `${plain(name)}: <b>${number(now[i])}</b>`);
    const bound = (k) => ranges.map((r) => (Number.isFinite(r[k]) ? r[k] : null));
    const traces = [
      { x, y: bound(0), mode: "lines", line: { width: 0 }, hoverinfo: "skip" },
      { x, y: bound(1), mode: "lines", line: { width: 0 }, fill: "tonexty", fillcolor: color("band"), hoverinfo: "skip" },
      { x, y: seen, mode: "lines+markers", text, hovertemplate: "%{text}<extra></extra>", line: { color: color("accent"), width: 2 }, marker: { size: 6 } },
      { x: odd, y: odd.map(() => Math.min(...bound(0).filter((v) => v !== null), Infinity)), mode: "markers", text: odd.map((i) => text[i]), hovertemplate: "%{text}<extra></extra>", marker: { symbol: "x", size: 9, color: color("bad") } },
    ];
    const seenRange = range(ranges.flat().filter(Number.isFinite)).map((v) => (view.log ? Math.log10(v) : v));
    const room = (seenRange[1] - seenRange[0]) * 0.08 || 1;
    const fixed = { automargin: false, fixedrange: false };
    return Plotly.react(element, traces, layout({
      margin: { l: 56, r: 12, t: 8, b: 110 }, uirevision: "kept",
      xaxis: { showgrid: false, tickangle: 40, range: [-0.7, x.length - 0.3], ...fixed, ...ticks(view.layers, 25) },
      yaxis: { type: view.log ? "log" : "linear", exponentformat: "power", range: [seenRange[0] - room, seenRange[1] + room], ...fixed },
    }), config);
  }

  /** Layers down, heads across, at one step; colours span the whole run. */
  function heads(element, view, matrix) {
    const [, rows, columns] = view.shape;
    const z = view.layers.map((_, i) => matrix.subarray(i * columns, (i + 1) * columns));
    view.names ||= view.layers.map((name) => Array(columns).fill(plain(name)));
    const trace = { type: "heatmap", z, customdata: view.names, hovertemplate: "%{customdata}, head %{x}: <b>%{z:.5g}</b><extra></extra>", colorscale: "Viridis", zmin: view.range[0], zmax: view.range[1], colorbar: scale("") };
    return Plotly.react(element, [trace], layout({ margin: beside(view.layers), xaxis: { title: { text: "head", standoff: 4 }, showgrid: false, dtick: Math.ceil(columns / 16), automargin: false }, yaxis: { range: [rows - 0.5, -0.5], showgrid: false, automargin: false, ...ticks(view.layers) } }), config);
  }

  /** Put the chosen step and row over a chart: a chart of 50,000 cells is not drawn again for them. */
  function place(element, step, row) {
    const area = element.querySelector(".nsewdrag");
    if (!area || !element.layout) return;
    const inner = area.getBoundingClientRect(), outer = element.getBoundingClientRect();
    const [left, top] = [inner.left - outer.left, inner.top - outer.top];
    const mark = (name) => element.querySelector(`:scope > .${name}`) || element.appendChild(Object.assign(document.createElement("div"), { className: name }));
    const set = (name, shown, style) => Object.assign(mark(name).style, { display: shown ? "block" : "none", ...style });
    if (step !== null) {
      const [low, high] = element.layout.xaxis.range, share = (step - low) / (high - low);
      set("tp-cursor", share >= 0 && share <= 1, { left: `${left + share * inner.width}px`, top: `${top}px`, height: `${inner.height}px` });
      mark("tp-cursor").dataset.step = step;
    }
    if (row !== null) {
      const [bottom, high] = element.layout.yaxis.range, share = (y) => Math.min(Math.max((high - y) / (high - bottom), 0), 1);
      const [from, to] = [share(row - 0.5), share(row + 0.5)];
      set("tp-row", row >= 0 && to > from, { left: `${left}px`, width: `${inner.width}px`, top: `${top + from * inner.height}px`, height: `${(to - from) * inner.height}px` });
      mark("tp-row").dataset.row = row;
    }
  }

  return { floats, ints, number, at, curve, heat, flow, heads, place };
})();
