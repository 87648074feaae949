"use strict";
// Draws the charts, sorts the table, changes the theme. Data come as JSON; no text from them becomes markup.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const PALETTE = ["#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#76b7b2", "#b07aa1", "#edc948", "#9c755f", "#8a919b"];
  const charts = [];

  const dollars = (value) => {
    const size = Math.abs(value);
    const digits = size >= 1 || size === 0 ? 2 : size >= 0.01 ? 4 : 6;
    return "$" + value.toLocaleString("en-US", { minimumFractionDigits: 2, maximumFractionDigits: digits });
  };
  const count = (value) => value.toLocaleString("en-US", { notation: value >= 10000 ? "compact" : "standard" });
  const percent = (value) => Math.round(value) + "%";

  // Colours are resolved by the browser: light-dark() follows the system and the button.
  const color = (name) => {
    const probe = document.createElement("span");
    probe.style.color = `var(--${name})`;
    document.body.append(probe);
    const found = getComputedStyle(probe).color;
    probe.remove();
    return found;
  };

  const bar = (series, place) => ({
    label: series.label, data: series.data, backgroundColor: PALETTE[place % PALETTE.length], maxBarThickness: 48,
  });
  const line = (series, place) => ({
    label: series.label, data: series.data, borderColor: PALETTE[place % PALETTE.length],
    backgroundColor: PALETTE[place % PALETTE.length], type: "line", borderWidth: 2, cubicInterpolationMode: "monotone",
    pointRadius: series.data.length > 31 ? 0 : 2, pointHitRadius: 8, spanGaps: true,
  });

  const draw = (id, datasets, format, { stacked = false, max, second } = {}) => {
    const ink = color("ink");
    const muted = color("muted");
    const grid = color("line");
    const axis = (form, extra) => ({
      beginAtZero: true, border: { display: false }, grid: { color: grid },
      ticks: { color: muted, callback: form, maxTicksLimit: 6 }, ...extra,
    });
    const scales = {
      x: {
        stacked, border: { color: grid }, grid: { display: false },
        ticks: { color: muted, maxRotation: 0, autoSkipPadding: 14 },
      },
      y: axis(format, { stacked, max }),
    };
    if (second) scales.second = axis(second, { position: "right", grid: { drawOnChartArea: false } });
    const say = (item) => `${item.dataset.label}: ${(item.dataset.yAxisID ? second : format)(item.parsed.y)}`;
    const sum = (items) => stacked && items.length > 1
      ? "total: " + format(items.filter((i) => !i.dataset.yAxisID).reduce((all, i) => all + i.parsed.y, 0)) : "";
    charts.push(new Chart(document.getElementById(id), {
      type: "bar",
      data: { labels: data.labels, datasets },
      options: {
        animation: false, maintainAspectRatio: false, interaction: { mode: "index", intersect: false }, scales,
        plugins: {
          legend: { position: "bottom", labels: { color: ink, boxWidth: 12, boxHeight: 12 }, display: datasets.length > 1 },
          tooltip: { filter: (item) => item.parsed.y !== 0, itemSort: (a, b) => b.parsed.y - a.parsed.y,
            callbacks: { label: say, footer: sum } },
        },
      },
    }));
  };

  const drawAll = () => {
    charts.splice(0).forEach((chart) => chart.destroy());
    draw("cost", data.cost.map(bar), dollars, { stacked: true });
    draw("tokens", data.tokens.map(bar), count, { stacked: true });
    draw("cached", data.cached.map(line), percent, { max: 100 });
    const wasted = data.wasted.map((series) => ({ ...line(series, 5), yAxisID: "second" }));
    draw("trouble", [...data.trouble.map((s, i) => bar(s, [3, 1, 6, 8][i])), ...wasted], count,
      { stacked: true, second: dollars });
    draw("per1000", data.per1000.map(line), dollars);
  };

  document.getElementById("charts").hidden = false;
  drawAll();

  // ── theme ──
  const theme = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.style.colorScheme || (system.matches ? "dark" : "light")) === "dark";
  const label = () => { theme.textContent = isDark() ? "Light" : "Dark"; };
  theme.hidden = false;
  theme.addEventListener("click", () => {
    root.style.colorScheme = isDark() ? "light" : "dark";
    label();
    drawAll();
  });
  system.addEventListener("change", () => { label(); drawAll(); });
  label();

  // ── sorting ──
  const table = document.querySelector("table");
  const headings = [...table.tHead.rows[0].cells];
  const value = (row, column) => row.cells[column].dataset.value ?? row.cells[column].textContent;
  const sort = (column) => {
    const heading = headings[column];
    const isText = column === 0;
    const order = heading.getAttribute("aria-sort") === (isText ? "ascending" : "descending") ? !isText : isText;
    headings.forEach((other) => other.removeAttribute("aria-sort"));
    heading.setAttribute("aria-sort", order ? "ascending" : "descending");
    const compare = isText
      ? (a, b) => value(a, column).localeCompare(value(b, column), "en", { numeric: true })
      : (a, b) => Number(value(a, column)) - Number(value(b, column));
    const rows = [...table.tBodies[0].rows].sort((a, b) => (order ? 1 : -1) * compare(a, b));
    table.tBodies[0].append(...rows);
  };
  headings.forEach((heading, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = heading.textContent;
    button.addEventListener("click", () => sort(column));
    heading.replaceChildren(button);
  });
})();
