"use strict";
(() => {
  const root = document.documentElement;
  root.classList.add("js");

  // Theme: that of the system, light or dark. The choice is not stored.
  const themes = [...document.querySelectorAll(".theme button")];
  for (const button of themes) {
    button.addEventListener("click", () => {
      if (button.value) root.dataset.theme = button.value;
      else delete root.dataset.theme;
      for (const other of themes) other.setAttribute("aria-pressed", String(other === button));
    });
  }

  // Tables and charts that are wider than the page: say that they scroll.
  const measure = new ResizeObserver((entries) => {
    for (const box of new Set(entries.map(({ target }) => target.closest(".scroll, .chart > div")))) {
      box.previousElementSibling.hidden = box.scrollWidth <= box.clientWidth + 1;
    }
  });
  for (const box of document.querySelectorAll(".scroll, .chart > div")) {
    const hint = document.createElement("p");
    hint.className = "hint";
    hint.textContent = "Wider than the page: scroll sideways to see the rest \u2192";
    hint.hidden = true;
    box.before(hint);
    for (const part of [box, ...box.children]) measure.observe(part);
  }

  // Before and after: pictures of the grids below, one on top of the other.
  const wipe = document.querySelector(".wipe");
  if (!wipe) return;
  const slider = wipe.querySelector("input");
  const output = wipe.querySelector("output");
  const method = wipe.querySelector("select");
  const pairs = [...wipe.querySelectorAll(".pair")].map((pair) => {
    const cell = (name) => document.querySelectorAll(
      `#scene-${pair.dataset.scene} img[data-method="${name}"]`)[pair.dataset.column];
    return { before: pair.appendChild(new Image()), after: pair.appendChild(new Image()), cell };
  });
  const show = (image, cell) => {
    image.src = cell.src;
    image.alt = cell.alt;
  };
  const choose = () => {
    for (const { before, after, cell } of pairs) {
      show(before, cell("0"));
      show(after, cell(method.value));
    }
  };
  const cut = () => {
    wipe.style.setProperty("--cut", `${slider.value}%`);
    output.value = `${slider.value} % before, ${100 - slider.value} % after`;
    slider.setAttribute("aria-valuetext", output.value);
  };
  method.addEventListener("change", choose);
  slider.addEventListener("input", cut);
  choose();
  cut();
})();
