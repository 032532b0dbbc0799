"use strict";
(() => {
  const root = document.documentElement;
  root.classList.add("scripted");
  const make = (name, attributes) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    return element;
  };

  // Switches: a button sets an attribute of <html>, and the style sheet does the rest.
  const press = () => {
    for (const button of document.querySelectorAll("button[data-set]"))
      button.setAttribute("aria-pressed", root.dataset[button.dataset.set] === button.dataset.to);
  };
  document.addEventListener("click", (event) => {
    const button = event.target.closest("button[data-set]");
    if (!button) return;
    root.dataset[button.dataset.set] = button.dataset.to;
    press();
    leave();
  });
  press();

  // Read-out: the pointer's place on one chart is shown on all, at each line's nearest point.
  const compact = (value) => {
    for (const [scale, letter] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]])
      if (Math.abs(value) >= scale * 0.9995) return Number((value / scale).toPrecision(3)) + letter;
    return String(Number(value.toPrecision(3)));
  };
  const spell = (kind, value) => {
    if (value === null) return "not finite";
    if (kind === "compact") return compact(value);
    if (kind === "percent") return (value * 100).toFixed(1) + "%";
    if (kind === "power") return value.toExponential(2);
    return Math.abs(value) < 1e-2 || Math.abs(value) >= 1e4 ? String(Number(value.toPrecision(4))) : value.toFixed(3);
  };
  const nearest = (sorted, wanted) => {
    let low = 0, high = sorted.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (sorted[middle] < wanted) low = middle; else high = middle;
    }
    return wanted - sorted[low] <= sorted[high] - wanted ? low : high;
  };
  const charts = [...document.querySelectorAll("figure[data-series]")].map((figure) => ({
    figure, kind: figure.dataset.kind, series: JSON.parse(figure.dataset.series), at: figure.querySelector(".at"),
    outputs: [...figure.querySelectorAll(".legend li")].map((item) => ({ item, output: item.querySelector("output") })),
    resting: [...figure.querySelectorAll("output")].map((output) => output.textContent),
  }));
  const numbers = (text) => text.split(" ").map(Number);
  const drawn = (figure) => [...figure.querySelectorAll("svg")].find((svg) => svg.getClientRects().length);
  const clear = () => { for (const mark of document.querySelectorAll(".pointer")) mark.remove(); };

  // Where a value lies between a drawing's ends, and back.
  const share = (svg, value) => {
    const [x0, x1, , , , log] = numbers(svg.dataset.domain);
    return log ? Math.log(value / x0) / Math.log(x1 / x0) : (value - x0) / (x1 - x0);
  };
  const between = (svg, part) => {
    const [x0, x1, , , , log] = numbers(svg.dataset.domain);
    return log ? x0 * (x1 / x0) ** part : x0 + part * (x1 - x0);
  };

  const show = (axis, place) => {
    clear();
    for (const chart of charts) {
      const svg = drawn(chart.figure);
      if (!svg || svg.dataset.axis !== axis) continue;
      const [x0, x1, y0, y1, log] = numbers(svg.dataset.domain), [left, top, width, height] = numbers(svg.dataset.plot);
      if (place < x0 || place > x1) continue;
      const part = (value) => share(svg, value), across = (value) => left + part(value) * width;
      const up = (value) => log ? Math.log(value / y0) / Math.log(y1 / y0) : (value - y0) / (y1 - y0);
      const group = make("g", { class: "pointer" });
      group.append(make("path", { class: "cursor", d: `M${across(place)} ${top}v${height}` }));
      chart.series.forEach((line, index) => {
        const at = line[axis], { item, output } = chart.outputs[index];
        if (part(place) > part(at[at.length - 1]) + 0.01 || part(place) < part(at[0]) - 0.01) { output.textContent = "–"; return; }
        const point = nearest(at, place), value = line.values[point];
        output.textContent = spell(chart.kind, value);
        if (value !== null) group.append(make("circle", {
          class: item.className, cx: across(at[point]), cy: top + (1 - up(value)) * height, r: 3.5 }));
      });
      chart.at.textContent = axis === "steps" ? `step ${Math.round(place).toLocaleString("en")}` : `${compact(place)} tokens`;
      svg.append(group);
    }
  };
  const leave = () => {
    clear();
    for (const chart of charts) {
      chart.at.textContent = "";
      chart.outputs.forEach(({ output }, index) => { output.textContent = chart.resting[index]; });
    }
  };
  for (const { figure } of charts) for (const svg of figure.querySelectorAll("svg")) {
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const [left, , width] = numbers(svg.dataset.plot);
      const inside = ((event.clientX - box.left) / box.width * svg.viewBox.baseVal.width - left) / width;
      show(svg.dataset.axis, between(svg, Math.min(1, Math.max(0, inside))));
    });
    svg.addEventListener("pointerleave", leave);
  }
})();
