const room = matchMedia("(min-width: 70rem)"), contents = document.querySelector("nav details");
const fit = () => { contents.open = room.matches; };
fit();
room.addEventListener("change", fit);
const reveal = () => {
  const part = location.hash && document.getElementById(location.hash.slice(1));
  if (part) { part.querySelector("details").open = true; part.scrollIntoView(); }
};
addEventListener("hashchange", reveal);
reveal();
for (const over of document.querySelectorAll("img[data-under]")) {
  const under = document.getElementById(over.dataset.under), below = under.cloneNode();
  below.removeAttribute("id");
  const sheet = document.createElement("div"), box = document.createElement("div");
  const row = document.createElement("label"), at = document.createElement("input");
  sheet.className = "sheet";
  box.className = "wipe";
  row.className = "slide";
  over.replaceWith(sheet);
  box.append(below, over);
  Object.assign(at, {type: "range", min: 0, max: 100, value: 50});
  at.setAttribute("aria-label", `how far ${under.dataset.name} covers ${over.dataset.name}`);
  row.append(under.dataset.name, at, over.dataset.name);
  sheet.append(row, box);
}
for (const sheet of document.querySelectorAll(".sheet")) {
  const at = sheet.querySelector("input[type=range]");
  if (!at) continue;
  const move = (value) => { at.value = value; sheet.style.setProperty("--at", `${at.value}%`); };
  at.addEventListener("input", () => move(at.value));
  for (const box of sheet.querySelectorAll(".wipe")) {
    const point = (event) => {
      const place = box.getBoundingClientRect();
      move(100 * (event.clientX - place.left) / place.width);
    };
    const drag = (event) => event.pointerType !== "touch";  // a finger scrolls; its tap is a click
    box.addEventListener("pointerdown", (event) => { if (drag(event)) { box.setPointerCapture(event.pointerId); point(event); } });
    box.addEventListener("pointermove", (event) => { if (drag(event) && box.hasPointerCapture(event.pointerId)) point(event); });
    box.addEventListener("click", point);
    box.addEventListener("dragstart", (event) => event.preventDefault());
  }
}
