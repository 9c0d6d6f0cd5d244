// Draws the charts and heatmaps of a report. The numbers are in the element `data`, as charts.py writes them.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const LEFT = 62, RIGHT = 12, BOTTOM = 24; // pixels around a drawing
  const tip = document.body.appendChild(Object.assign(document.createElement("div"), { className: "tip" }));

  const ends = data.axes.flatMap(({ begin, tokens }) => [begin[1], tokens[tokens.length - 1]]);
  const whole = [Math.min(...ends), Math.max(...ends)];
  if (whole[0] === whole[1]) whole[0] -= 1;
  let view = whole; // the tokens that all charts show

  for (const [chart, curve] of data.charts.flatMap((chart) => chart.curves.map((curve) => [chart, curve]))) {
    const { begin, tokens, steps } = data.axes[curve.axis];
    const at = curve.at || tokens.map((_, i) => i);
    curve.x = at.map((i) => tokens[i]);
    curve.step = at.map((i) => steps[i]);
    curve.from = at.map((i, n) => (chart.stack && n ? steps[at[n - 1]] : i ? steps[i - 1] : begin[0]) + 1);
    curve.gaps = new Set(curve.gaps);
  }

  // The first place in an ascending list whose value is not below x.
  function place(list, x) {
    let [low, high] = [0, list.length];
    while (low < high) {
      const middle = (low + high) >> 1;
      [low, high] = list[middle] < x ? [middle + 1, high] : [low, middle];
    }
    return low;
  }

  function nearest(list, x) {
    const i = Math.min(place(list, x), list.length - 1);
    return i > 0 && x - list[i - 1] < list[i] - x ? i - 1 : i;
  }

  function short(value, isShare) {
    if (value === null) return "no number";
    if (isShare) return +(100 * value).toFixed(1) + "%";
    const size = Math.abs(value);
    if (Number.isInteger(value) && size < 1e5) return value.toLocaleString("en");
    const [unit, one] = [["T", 1e12], ["B", 1e9], ["M", 1e6], ["k", 1e3]].find((one) => size >= one[1]) || [];
    if (one && size < 1e15) return +(value / one).toPrecision(4) + unit;
    return size && (size < 1e-3 || size >= 1e15) ? value.toExponential(2).replace(/\.?0+e/, "e") : String(+value.toPrecision(5));
  }

  function make(parent, name, attributes, text) {
    const element = set(document.createElementNS("http://www.w3.org/2000/svg", name), attributes);
    parent.append(element);
    if (text !== undefined) element.textContent = text;
    return element;
  }

  function set(element, attributes) {
    for (const key in attributes) element.setAttribute(key, attributes[key]);
    return element;
  }

  function ticks(low, high, most) {
    const rough = (high - low) / most, power = 10 ** Math.floor(Math.log10(rough));
    const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
    const first = Math.ceil(low / step - 1e-9), last = Math.floor(high / step + 1e-9);
    return Array.from({ length: Math.max(last - first + 1, 0) }, (_, i) => (first + i) * step);
  }

  function logTicks(low, high) {
    const powers = ticks(Math.floor(Math.log10(low)), Math.ceil(Math.log10(high)), 40).filter(Number.isInteger);
    const all = powers.flatMap((power) => [1, 2, 5].map((factor) => +`${factor}e${power}`));
    const inside = all.filter((one) => one >= low && one <= high);
    if (inside.length < 3) return ticks(low, high, 4);
    return inside.length < 8 ? inside : inside.filter((one) => Number.isInteger(Math.log10(one)));
  }

  // An empty drawing with the axis of tokens. `read(tokens, y)` returns the lines of the tip.
  function frame(box, top, height, read, grid = true) {
    box.replaceChildren();
    const width = Math.max(box.clientWidth, 260), right = width - RIGHT, bottom = top + height;
    const svg = make(box, "svg", { viewBox: `0 0 ${width} ${bottom + BOTTOM}`, role: "img" });
    const scale = (right - LEFT) / (view[1] - view[0]);
    const x = (tokens) => LEFT + (tokens - view[0]) * scale;
    const pixels = (event) => {
      const shape = svg.getBoundingClientRect(), zoom = width / shape.width;
      return [Math.min(Math.max((event.clientX - shape.left) * zoom, LEFT), right), (event.clientY - shape.top) * zoom];
    };
    const tokensAt = (event) => view[0] + (pixels(event)[0] - LEFT) / scale;
    for (const tick of ticks(view[0], view[1], width / 130)) {
      make(svg, "line", { class: "tick", x1: x(tick), x2: x(tick), y1: grid ? top : bottom, y2: bottom + 4 });
      make(svg, "text", { class: "axis", x: x(tick), y: bottom + 16, "text-anchor": "middle" }, short(tick));
    }
    const layer = make(svg, "g");
    const cursor = make(svg, "line", { class: "cursor", y1: top, y2: bottom, visibility: "hidden" });
    const chosen = make(svg, "rect", { class: "chosen", y: top, height, width: 0 });
    let from = null;
    svg.onpointerdown = (event) => {
      from = tokensAt(event);
      svg.setPointerCapture(event.pointerId);
    };
    svg.onpointermove = (event) => {
      const here = tokensAt(event);
      set(cursor, { x1: x(here), x2: x(here), visibility: "visible" });
      if (from !== null) set(chosen, { x: x(Math.min(from, here)), width: Math.abs(x(here) - x(from)) });
      tell(event, read(here, pixels(event)[1], (one) => Math.abs(x(one) - x(here)) < 6));
    };
    svg.onpointerleave = () => {
      tip.style.display = "none";
      set(cursor, { visibility: "hidden" });
    };
    svg.onpointerup = (event) => {
      const ends = [from, tokensAt(event)].sort((a, b) => a - b);
      if (from !== null && x(ends[1]) - x(ends[0]) > 5) show(ends);
      from = null;
      set(chosen, { width: 0 });
    };
    svg.ondblclick = () => show(whole);
    return { layer, x, width, right, bottom };
  }

  function tell(event, lines) {
    tip.replaceChildren();
    for (const [colour, text] of lines) {
      const sign = Object.assign(document.createElement("i"), { className: colour });
      tip.appendChild(document.createElement("p")).append(...(colour ? [sign] : []), text);
    }
    tip.style.display = lines.length ? "block" : "none";
    const right = event.clientX + tip.offsetWidth + 24 > document.documentElement.clientWidth;
    tip.style.left = Math.max(event.pageX + (right ? -tip.offsetWidth - 14 : 14), 4) + "px";
    tip.style.top = event.pageY + 14 + "px";
  }

  function extent(chart, log) {
    let low = Infinity, high = -Infinity;
    for (const { x, mean, low: lows = mean, high: highs = mean } of chart.curves)
      for (let i = place(x, view[0]); i < x.length && x[i] <= view[1]; i++) {
        if (mean[i] !== null && (!log || lows[i] > 0)) low = Math.min(low, lows[i]);
        if (mean[i] !== null && (!log || highs[i] > 0)) high = Math.max(high, highs[i]);
      }
    if (low > high) [low, high] = [1, 2]; // nothing to see
    const room = high > low ? (high - low) / 20 : Math.abs(high || 1) / 10;
    return log ? [low / 1.1, high * 1.1] : [low - room, high + room];
  }

  function drawChart(box, chart) {
    const log = chart.log, top = chart.marks.length ? 20 : 8, height = chart.wide ? 250 : 150;
    const [low, high] = chart.stack ? [0, 1] : extent(chart, log);
    const bend = (value) => (log ? Math.log(Math.max(value, low / 10)) : value);
    const { layer, x, right, bottom } = frame(box, top, height, (tokens, _, near) => read(chart, tokens, near));
    const y = (value) => bottom - ((bend(value) - bend(low)) / (bend(high) - bend(low))) * height;
    const id = `clip${data.charts.indexOf(chart)}`;
    make(make(layer, "clipPath", { id }), "rect", { x: LEFT, y: top, width: right - LEFT, height });
    chart.phases.forEach(({ name, from, to }, i) => {
      const [a, b] = [from, to].map((at) => x(Math.min(Math.max(at, view[0]), view[1])));
      make(layer, "rect", { class: `phase odd${i % 2}`, x: a, y: top, width: b - a, height });
      const text = make(layer, "text", { class: "axis", x: a + 4, y: top + 12 }, name);
      if (!chart.wide || text.getComputedTextLength() > b - a - 6) text.remove();
    });
    for (const tick of log ? logTicks(low, high) : ticks(low, high, height / 40)) {
      make(layer, "line", { class: "tick", x1: LEFT, x2: right, y1: y(tick), y2: y(tick) });
      const label = { class: "axis", x: LEFT - 6, y: y(tick) + 3, "text-anchor": "end" };
      make(layer, "text", label, short(+tick.toPrecision(6), chart.stack));
    }
    const inside = make(layer, "g", { "clip-path": `url(#${id})` });
    for (const curve of chart.curves) {
      const point = (i, values, left = i) => `${x(left < 0 ? whole[0] : curve.x[left]).toFixed(1)},${y(values[i]).toFixed(1)}`;
      const bar = (values) => (i) => (chart.stack ? [point(i, values, i - 1), point(i, values)] : [point(i, values)]);
      const found = pieces(curve), dots = found.flat().length <= 60 ? found.flat() : found.filter((piece) => !piece[1]).flat();
      for (const piece of curve.low ? found : []) {
        const d = [...piece.flatMap(bar(curve.high)), ...piece.flatMap(bar(curve.low)).reverse()].join("L");
        make(inside, "path", { class: `${curve.colour} ${chart.stack ? "share" : "band"}`, d: `M${d}Z` });
      }
      if (chart.stack) continue;
      const d = found.map((piece) => "M" + piece.map((i) => point(i, curve.mean)).join("L")).join("");
      make(inside, "path", { class: `${curve.colour} curve`, d, "stroke-dasharray": data.dashes[curve.dash] });
      for (const i of dots) make(inside, "circle", { class: curve.colour, cx: x(curve.x[i]), cy: y(curve.mean[i]), r: 2.2 });
    }
    for (const { kind, sign, at } of chart.marks.filter(({ at }) => at >= view[0] && at <= view[1])) {
      make(layer, "line", { class: `mark ${kind}`, x1: x(at), x2: x(at), y1: top, y2: bottom });
      make(layer, "text", { class: `sign ${kind}`, x: x(at), y: 14, "text-anchor": "middle" }, sign);
    }
  }

  // What is drawn without a break, as lists of places.
  function pieces({ x, mean, gaps }) {
    const found = [[]], last = Math.min(place(x, view[1]) + 1, x.length);
    for (let i = Math.max(place(x, view[0]) - 1, 0); i < last; i++) {
      if (mean[i] !== null) found[found.length - 1].push(i);
      if (mean[i] === null || gaps.has(i)) found.push([]);
    }
    return found.filter((piece) => piece.length);
  }

  function read(chart, tokens, near) {
    let lines = [], last = "";
    for (const curve of chart.curves) {
      const i = nearest(curve.x, tokens), { mean, low, high } = curve;
      const [from, to] = [curve.from[i], curve.step[i]].map((step) => step.toLocaleString("en"));
      const where = `${from === to ? "step" : `steps ${from} to`} ${to}, ${short(curve.x[i])} tokens`;
      if (where !== last) lines.push(["", (last = where)]);
      const range = low && !chart.stack && low[i] !== null ? ` (${short(low[i])} to ${short(high[i])})` : "";
      lines.push([curve.colour, `${curve.label} ${short(mean[i], chart.stack)}${range}${curve.gaps.has(i) ? ", and no number" : ""}`]);
    }
    return lines.concat(chart.marks.filter((mark) => near(mark.at)).slice(0, 6).map(({ sign, text }) => ["", `${sign} ${text}`]));
  }

  function drawHeatmap(box, heat) {
    const rows = heat.layers * heat.experts, height = Math.min(Math.max(rows * 3, 110), 760), top = 6;
    const { layer, x, right, width } = frame(box, top, height, (tokens, y) => {
      const column = Math.min(place(heat.tokens, tokens), heat.tokens.length - 1);
      const row = Math.min(Math.max(Math.floor(((y - top) / height) * rows), 0), rows - 1);
      const load = data.loads[heat.codes[row * heat.tokens.length + column]];
      return [["", `layer ${Math.floor(row / heat.experts)}, expert ${row % heat.experts}`], ["", `up to ${short(heat.tokens[column])} tokens: ${load}`]];
    }, false);
    const sharp = window.devicePixelRatio || 1;
    const canvas = Object.assign(document.createElement("canvas"), { width: (right - LEFT) * sharp, height: height * sharp });
    const share = (part) => (100 * part) / width + "%";
    Object.assign(canvas.style, { top: top + "px", left: share(LEFT), width: share(right - LEFT) });
    box.prepend(canvas);
    const context = Object.assign(canvas.getContext("2d"), { imageSmoothingEnabled: false });
    heat.tokens.forEach((end, column) => {
      const from = (x(column ? heat.tokens[column - 1] : whole[0]) - LEFT) * sharp, to = (x(end) - LEFT) * sharp;
      context.drawImage(heat.image, column, 0, 1, rows, from, 0, to - from + 1, canvas.height);
    });
    for (let i = 0; i < heat.layers; i += Math.ceil((13 * heat.layers) / height)) {
      const y = top + (height * i) / heat.layers + 10;
      make(layer, "text", { class: "axis", x: LEFT - 6, y, "text-anchor": "end" }, `layer ${i}`);
    }
  }

  for (const heat of data.heatmaps) {
    heat.codes = Uint8Array.from(atob(heat.codes), (one) => one.charCodeAt(0));
    const pixels = new ImageData(heat.tokens.length, heat.layers * heat.experts);
    heat.codes.forEach((code, i) => pixels.data.set([...data.palette[code], 255], 4 * i));
    heat.image = Object.assign(document.createElement("canvas"), { width: pixels.width, height: pixels.height });
    heat.image.getContext("2d").putImageData(pixels, 0, 0);
  }

  function show(range) {
    view = range;
    for (const box of document.querySelectorAll("[data-chart]")) drawChart(box, data.charts[box.dataset.chart]);
    for (const box of document.querySelectorAll("[data-heatmap]")) drawHeatmap(box, data.heatmaps[box.dataset.heatmap]);
  }

  for (const button of document.querySelectorAll("button[data-log]")) button.onclick = () => {
    const chart = data.charts[button.dataset.log];
    set(button, { "aria-pressed": (chart.log = !chart.log) });
    show(view);
  };
  window.onresize = () => show(view);
  show(view);
})();
