"use strict";
const all = JSON.parse(document.getElementById("data").textContent);
const [cards, end, count, filter, errors, zoom] =
  ["cards", "end", "count", "filter", "errors", "zoom"].map(id => document.getElementById(id));
const texts = parts => parts.map(part => part.text || "").join(" ");
for (const card of all) {
  card.words = [card.id, texts(card.prompt), ...card.samples.flatMap(s => [texts(s.parts), s.error])]
    .join(" ").toLowerCase();
  card.failed = card.samples.some(s => s.error);
}
function make(tag, kind, text) {
  const node = document.createElement(tag);
  if (kind) node.className = kind;
  if (text) node.textContent = text;
  return node;
}
function image(part) {
  const longer = Math.max(part.height, part.width), small = longer <= 160;
  const node = make("img", small ? "small" : "");
  // Whole factors keep the pixels of a small one square.
  const scale = small ? Math.floor(160 / longer) : Math.min(1, @THUMBNAIL@ / longer);
  node.loading = "lazy"; node.decoding = "async"; node.alt = ""; node.src = encodeURI(part.thumbnail || part.image);
  node.width = Math.round(part.width * scale); node.height = Math.round(part.height * scale);
  node.onclick = () => {
    zoom.firstChild.src = encodeURI(part.image); zoom.firstChild.className = node.className; zoom.showModal();
  };
  return node;
}
const fill = (node, parts) => {
  for (const part of parts)
    node.append(part.image ? image(part) : make("p", part.ids && "ids", part.text || part.ids.join(" ")));
  return node;
};
function show(card) {
  const node = make("article", card.samples.length > 2 || card.samples.some(s => s.parts.length > 2) ? "wide" : "");
  const prompt = make("div", "prompt");
  prompt.append(make("small", "", card.id));
  fill(prompt, card.prompt);
  const results = make("div", "results");
  for (const sample of card.samples) {
    const figure = make("figure");
    if (sample.error) figure.append(make("p", "error", sample.error));
    figure.append(fill(make("div", "parts"), sample.parts));
    const number = card.samples.length > 1 && sample.n !== null ? `sample ${sample.n} · ` : "";
    figure.append(make("figcaption", "", number + sample.note + (sample.cut ? " · cut at its budget" : "")));
    results.append(figure);
  }
  node.append(prompt, results);
  return node;
}
let chosen = all, shown = 0;
const watch = new IntersectionObserver(seen => seen[0].isIntersecting && more(), { rootMargin: "1200px" });
function more() {
  const next = chosen.slice(shown, shown + 40);
  if (!next.length) return;
  end.before(...next.map(show));
  shown += next.length;
  watch.unobserve(end); watch.observe(end);  // asks again: the end may still be in view
}
function choose() {
  const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
  chosen = all.filter(card => words.every(word => card.words.includes(word)) && (!errors.checked || card.failed));
  const samples = chosen.reduce((sum, card) => sum + card.samples.length, 0);
  count.textContent = `${chosen.length.toLocaleString()} requests, ${samples.toLocaleString()} samples`;
  cards.replaceChildren(end);
  shown = 0;
  more();
  watch.observe(end);
}
filter.oninput = errors.onchange = choose;
zoom.onclick = () => zoom.close();
choose();
