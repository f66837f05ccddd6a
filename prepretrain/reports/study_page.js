// Shows a run's facts beside its point, and leads the arrow keys from point to point: of each
// figure, one point is in the order of the tab key.
const tip = document.getElementById("tip");

function show(point) {
  tip.textContent = document.getElementById(point.getAttribute("aria-labelledby")).textContent;
  tip.hidden = false;
  const box = point.getBoundingClientRect();
  const left = Math.min(box.left, document.documentElement.clientWidth - tip.offsetWidth - 8);
  const above = box.top - tip.offsetHeight - 8;
  tip.style.left = `${Math.max(8, left)}px`;
  tip.style.top = `${above < 0 ? box.bottom + 8 : above}px`;
}

function hide() {
  tip.hidden = true;
}

for (const drawing of document.querySelectorAll(".panel svg")) {
  const points = [...drawing.querySelectorAll("a.run")];
  const across = (a) => a.getBoundingClientRect().left;
  points.sort((a, b) => across(a) - across(b));
  if (points.length) points[0].tabIndex = 0;
  points.forEach((point, i) => {
    point.addEventListener("pointerenter", () => show(point));
    point.addEventListener("pointerleave", hide);
    point.addEventListener("focus", () => show(point));
    point.addEventListener("blur", hide);
    point.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (event.key === "Escape") hide();
      if (!step) return;
      event.preventDefault();
      const next = points[(i + step + points.length) % points.length];
      point.tabIndex = -1;
      next.tabIndex = 0;
      next.focus();
    });
  });
}
window.addEventListener("scroll", hide, { passive: true });
