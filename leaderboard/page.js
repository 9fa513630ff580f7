"use strict";

// Sorting: a click on a heading orders the rows of each part of its table; a second click turns the order round. Rows
// without a value stay last, and every part stays where it is: what is not ranked never stands among ranked rows.
for (const table of document.querySelectorAll("table[data-sortable]")) {
  for (const button of table.querySelectorAll("thead button")) {
    button.addEventListener("click", () => {
      const heading = button.closest("th");
      const column = heading.cellIndex;
      const first = heading.dataset.first;
      const second = first === "ascending" ? "descending" : "ascending";
      const order = heading.getAttribute("aria-sort") === first ? second : first;
      for (const other of heading.parentElement.cells) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      for (const body of table.tBodies) {
        const rows = [...body.rows].filter((row) => !row.classList.contains("group"));
        rows.sort((a, b) => {
          const x = a.cells[column].dataset.value, y = b.cells[column].dataset.value;
          if (x === "" || y === "") return (x === "") - (y === "");
          return sign * (heading.dataset.text === undefined ? x - y : x.localeCompare(y, undefined, {numeric: true}));
        });
        body.append(...rows);
      }
    });
  }
}

// Filters: a row is shown where it has all that is chosen; parts, tables and chapters without a row are not.
const filters = document.querySelector("form.filters");
const charts = [];
function filter() {
  const wanted = Object.fromEntries([...filters.elements].filter((one) => one.name).map((one) => [one.name, one.value]));
  let shown = 0, all = 0;
  for (const chapter of document.querySelectorAll(".chapter")) {
    let inChapter = 0;
    for (const table of chapter.querySelectorAll("table[data-sortable]")) {
      const part = table.closest(".protocol") ?? chapter;
      const known = {track: chapter.dataset.track, protocol: part.dataset.protocol};
      let inTable = 0;
      for (const body of table.tBodies) {
        let inBody = 0;
        for (const row of body.rows) {
          if (row.classList.contains("group")) continue;
          const has = {...known, ...row.dataset};
          row.hidden = Object.entries(wanted).some(([key, value]) => value && has[key] !== value && has[key] !== "*");
          inBody += !row.hidden;
          if (!table.classList.contains("costs")) { all++; shown += !row.hidden; }
        }
        for (const row of body.querySelectorAll(".group")) row.hidden = !inBody;
        inTable += inBody;
      }
      if (part !== chapter) part.hidden = !inTable;
      inChapter += inTable;
    }
    chapter.classList.toggle("empty", !inChapter);
  }
  filters.querySelector("[role=status]").textContent = `${shown} of ${all} rows shown`;
  document.querySelector(".none").hidden = shown > 0;
  for (const draw of charts) draw();
}
if (filters) {
  filters.addEventListener("change", filter);
  filters.addEventListener("submit", (event) => event.preventDefault());
  filters.addEventListener("reset", () => setTimeout(filter)); // once the choices are back
}

// Pairs: two chosen rows of one leaderboard make the address of their page.
const bar = document.querySelector(".picked");
let picked = [];
function pick(box) {
  if (box.checked) {
    const own = box.closest(".chapter");
    picked = picked.filter((other) => other.closest(".chapter") === own);
    picked.push(box);
    if (picked.length > 2) picked.shift();
    box.closest(".scroll").after(bar); // the next stop of the keyboard after the table
  } else {
    picked = picked.filter((other) => other !== box);
  }
  show();
}
function show() {
  for (const box of document.querySelectorAll("th.name input")) box.checked = picked.includes(box);
  bar.hidden = picked.length === 0;
  document.body.classList.toggle("picking", picked.length > 0);
  const names = picked.map((box) => box.dataset.name);
  const both = picked.length === 2;
  bar.querySelector("p").textContent = both ? `${names[0]} and ${names[1]}` : names.length ? `${names[0]}, and one more to choose` : "";
  const link = bar.querySelector("a");
  link.hidden = !both;
  if (both) link.href = `pair.html#a=${picked[0].value}&b=${picked[1].value}`;
}
if (bar) {
  for (const box of document.querySelectorAll("th.name input")) box.addEventListener("change", () => pick(box));
  bar.querySelector("button").addEventListener("click", () => {
    const last = picked.at(-1);
    picked = [];
    show();
    last?.focus();
  });
  show(); // a browser may bring back earlier choices when the page is loaded again
}

// Quality against cost.
const SVG = "http://www.w3.org/2000/svg";
function shape(name, attributes, ...children) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function roundTicks(low, high) {
  const raw = Math.max(high - low, 1e-9) / 3;
  const unit = 10 ** Math.floor(Math.log10(raw));
  const step = unit * [1, 2, 5, 10].find((factor) => factor * unit >= raw);
  const first = Math.floor(low / step), last = Math.max(Math.ceil(high / step), first + 1);
  return Array.from({length: last - first + 1}, (_, k) => (first + k) * step);
}

const UNITS = {wall_s: [3600, "h"], gpu_hours: [1, "GPU h"], peak_memory_bytes: [1e9, "GB"], parameters: [1e6, "M"]};
const digits = (ticks) => Math.max(0, -Math.floor(Math.log10(ticks[1] - ticks[0]) + 1e-9));

for (const part of document.querySelectorAll(".scatter")) {
  const chapter = part.closest(".chapter");
  const units = part.dataset.units.split(" ");
  const percent = part.dataset.percent.split(" ");
  const better = part.dataset.better.split(" ");
  const [metric, cost] = part.querySelectorAll("select");
  const plot = part.querySelector(".plot");
  const draw = () => {
    const which = Number(metric.value), spent = Number(cost.value);
    const scale = percent[which] === "1" ? 100 : 1, sign = better[which] === "higher" ? 1 : -1;
    const [unit, unitName] = UNITS[units[spent]];
    const points = [];
    for (const row of chapter.querySelectorAll("table.costs tbody tr")) {
      const ranked = chapter.querySelector(`table:not(.costs) tr[data-id="${row.dataset.id}"]`);
      const cell = ranked.cells[ranked.cells.length - percent.length + which];
      const price = row.cells[2 + spent].dataset.value;
      if (row.hidden || cell.dataset.value === "" || price === "") continue;
      const at = (value) => value === undefined ? undefined : Number(value) * scale;
      points.push({
        x: Number(price) / unit, y: at(cell.dataset.value), low: at(cell.dataset.low), high: at(cell.dataset.high),
        number: row.cells[1].textContent, name: row.cells[0].textContent,
        told: `${cell.firstChild.textContent}, ${row.cells[2 + spent].textContent}`,
      });
    }
    if (!points.length) {
      plot.replaceChildren("No row has both.");
      return;
    }
    const width = Math.min(720, Math.max(300, plot.clientWidth)), height = Math.min(320, width * 0.75), left = 58, right = 16, top = 14, bottom = 44;
    const levels = points.flatMap((point) => [point.y, point.low, point.high]).filter((level) => level !== undefined);
    const ys = roundTicks(Math.min(...levels), Math.max(...levels));
    const xs = roundTicks(Math.min(...points.map((point) => point.x)), Math.max(...points.map((point) => point.x)));
    const x = (value) => left + (value - xs[0]) / (xs.at(-1) - xs[0]) * (width - left - right);
    const y = (value) => top + (ys.at(-1) - value) / (ys.at(-1) - ys[0]) * (height - top - bottom);
    const name = metric.selectedOptions[0].textContent.split(" (")[0], price = cost.selectedOptions[0].textContent;
    const label = `${name} against ${price}. ` + points.map((point) => `${point.name}: ${point.told}`).join("; ");
    const svg = shape("svg", {viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label});
    const text = (content, attributes) => svg.append(shape("text", attributes, content));
    for (const tick of ys) {
      svg.append(shape("path", {class: "grid", d: `M${left} ${y(tick)}H${width - right}`}));
      text(tick.toFixed(digits(ys)) + (scale === 100 ? "%" : ""), {x: left - 8, y: y(tick) + 4, "text-anchor": "end"});
    }
    for (const tick of xs) text(tick.toFixed(digits(xs)), {x: x(tick), y: height - 24, "text-anchor": "middle"});
    text(`${price}, ${unitName} →`, {x: (left + width - right) / 2, y: height - 5, "text-anchor": "middle"});
    const front = [];
    for (const point of [...points].sort((a, b) => a.x - b.x || sign * (b.y - a.y))) {
      if (!front.length || sign * (point.y - front.at(-1).y) > 0) front.push(point);
    }
    svg.append(shape("path", {class: "line front", d: "M" + front.map((point) => `${x(point.x)} ${y(point.y)}`).join("L")}));
    for (const point of points) {
      if (point.low !== undefined) svg.append(shape("path", {class: "bar", d: `M${x(point.x)} ${y(point.low)}V${y(point.high)}`}));
    }
    for (const point of points) {
      svg.append(
        shape("circle", {class: "dot", cx: x(point.x), cy: y(point.y), r: 9},
          shape("title", {}, `${point.name}: ${point.told}`)),
        shape("text", {class: "number", x: x(point.x), y: y(point.y) + 4, "text-anchor": "middle"}, point.number));
    }
    plot.replaceChildren(svg);
  };
  metric.addEventListener("change", draw);
  cost.addEventListener("change", draw);
  charts.push(draw);
}

// Images: show the block of the chosen variant and subject.
for (const part of document.querySelectorAll(".images")) {
  const choices = [...part.querySelectorAll(".choose select")];
  const choose = () => {
    const wanted = choices.map((choice) => choice.value).join("/");
    let found = false;
    for (const block of part.querySelectorAll(".gallery")) {
      block.hidden = block.dataset.block !== wanted;
      found ||= !block.hidden;
    }
    part.querySelector(".no-images").hidden = found;
  };
  for (const choice of choices) choice.addEventListener("change", choose);
  choose(); // a browser may bring back an earlier choice when the page is loaded again
}

addEventListener("resize", () => charts.forEach((draw) => draw()));
if (filters) filter();
