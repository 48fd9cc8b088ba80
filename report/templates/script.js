"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const tooltip = document.getElementById("tooltip");

  function show(event, text) {
    tooltip.textContent = text;
    tooltip.hidden = false;
    const { width, height } = tooltip.getBoundingClientRect();
    const left = event.clientX + 14 + width > window.innerWidth ? event.clientX - 14 - width : event.clientX + 14;
    const top = event.clientY + 16 + height > window.innerHeight ? event.clientY - 16 - height : event.clientY + 16;
    tooltip.style.left = `${Math.max(4, left)}px`;
    tooltip.style.top = `${Math.max(4, top)}px`;
  }

  function inside(svg, event) {
    const box = svg.getBoundingClientRect();
    const scale = (svg.viewBox.baseVal?.width || box.width) / box.width;
    return { x: (event.clientX - box.left) * scale, y: (event.clientY - box.top) * scale };
  }

  function nearest(xs, x) {
    let best = 0;
    for (let i = 1; i < xs.length; i++) if (Math.abs(xs[i] - x) < Math.abs(xs[best] - x)) best = i;
    return best;
  }

  for (const svg of document.querySelectorAll("svg[data-chart]")) {
    const chart = data.charts[svg.dataset.chart];
    const left = +svg.dataset.left, right = +svg.dataset.right, length = +svg.dataset.length;
    const cross = document.createElementNS("http://www.w3.org/2000/svg", "line");
    cross.setAttribute("class", "cross");
    svg.addEventListener("pointermove", (event) => {
      const at = ((inside(svg, event).x - left) / (right - left)) * length;
      const lines = chart.lines.filter((line) => line.x.length);
      if (!lines.length) return;
      const found = lines.map((line) => nearest(line.x, at));
      const x = left + ((right - left) * lines[0].x[found[0]]) / Math.max(length, 1);
      for (const [name, value] of [["x1", x], ["x2", x], ["y1", 22], ["y2", 166]]) cross.setAttribute(name, value);
      svg.append(cross);
      const said = lines.map((line, i) => {
        const y = line.y[found[i]];
        const value = y === null ? "not finite" : chart.percent ? (100 * y).toFixed(2) : y.toPrecision(4);
        return `${line.name} ${value}${line.x[found[i]] === lines[0].x[found[0]] ? "" : ` at ${line.x[found[i]]}`}`;
      });
      show(event, `iteration ${lines[0].x[found[0]]}\n${said.join("\n")}`);
    });
    svg.addEventListener("pointerleave", () => { cross.remove(); tooltip.hidden = true; });
  }

  for (const svg of document.querySelectorAll("svg[data-matrix]")) {
    const { names, rows } = data.matrices[svg.dataset.matrix];
    const cell = +svg.dataset.cell, top = +svg.dataset.top;
    svg.addEventListener("pointermove", (event) => {
      const { x, y } = inside(svg, event);
      const row = Math.floor((y - top) / cell), column = Math.floor(x / cell);
      if (!(row in rows) || !(column in rows)) { tooltip.hidden = true; return; }
      const share = rows[row] === null ? "no pixel in the masks" : `${(100 * rows[row][column]).toFixed(2)} %`;
      show(event, `${names[row]} taken for ${names[column]}\n${share}`);
    });
    svg.addEventListener("pointerleave", () => { tooltip.hidden = true; });
  }

  for (const bar of document.querySelectorAll("[data-sorts]")) {
    const list = document.getElementById(bar.dataset.sorts);
    const value = (item, by) => JSON.parse(item.dataset.values)[by] ?? -1;
    bar.hidden = false;
    bar.addEventListener("click", (event) => {
      const by = event.target.dataset.by;
      if (by === undefined) return;
      const order = by === "order" ? (a, b) => a.dataset.order - b.dataset.order : (a, b) => value(b, by) - value(a, by);
      list.append(...[...list.children].sort(order));
      for (const button of bar.querySelectorAll("button")) button.setAttribute("aria-pressed", button.dataset.by === by);
    });
  }

  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, index) => {
      if (head.querySelector(".unseen")) return;
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") !== "descending";
        const key = (row) => row.cells[index].textContent.trim();
        const compare = (a, b) => {
          const [x, y] = [parseFloat(key(a)), parseFloat(key(b))];
          if (isNaN(x) && isNaN(y)) return key(b).localeCompare(key(a));
          return isNaN(x) ? 1 : isNaN(y) ? -1 : down ? y - x : x - y;
        };
        const words = [...table.tBodies[0].rows].every((row) => isNaN(parseFloat(key(row))));
        const rows = [...table.tBodies[0].rows].sort((a, b) => (words && !down ? compare(b, a) : compare(a, b)));
        table.tBodies[0].append(...rows);
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
      });
    });
  }

  let opened = [];
  window.addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details.evaluation:not([open]), details.run:not([open])")];
    for (const details of opened) details.open = true;
  });
  window.addEventListener("afterprint", () => { for (const details of opened) details.open = false; });

  function reveal() {
    const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    for (let box = target; box; box = box.parentElement) if (box.tagName === "DETAILS") box.open = true;
    if (target) target.scrollIntoView();
  }
  window.addEventListener("hashchange", reveal);
  if (location.hash) reveal();
})();
