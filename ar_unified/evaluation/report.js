// The values under the pointer, for every chart.
for (const plot of document.querySelectorAll(".plot")) {
  const series = JSON.parse(plot.dataset.series);
  const [left, right] = plot.dataset.x.split(",").map(Number);
  const cursor = plot.querySelector(".cursor"), tip = plot.querySelector(".tip");
  const nearest = (points, x) => points.reduce((a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a));
  const show = (event) => {
    const box = plot.getBoundingClientRect();
    const at = Math.min(Math.max((event.clientX - box.left) / box.width, 0), 1);
    const x = nearest(series.flatMap(([, points]) => points), left + at * (right - left))[0];
    const share = (x - left) / (right - left);
    tip.replaceChildren();
    tip.append(Object.assign(document.createElement("div"), { className: "soft", textContent: "step " + x.toLocaleString("en") }));
    series.forEach(([name, points], i) => {
      const row = document.createElement("div"), dot = document.createElement("b"), label = document.createElement("span");
      dot.style.background = `var(--c${i % 6})`;
      label.textContent = name;
      row.append(dot, label, String(Number(nearest(points, x)[1].toPrecision(4))));
      tip.append(row);
    });
    cursor.style.left = tip.style.left = share * 100 + "%";
    tip.style.transform = `translateX(${share > 0.5 ? "calc(-100% - 10px)" : "10px"})`;
    cursor.hidden = tip.hidden = false;
  };
  plot.addEventListener("pointermove", show);
  plot.addEventListener("pointerdown", show);
  plot.addEventListener("pointerleave", () => (cursor.hidden = tip.hidden = true));
}
