"use strict";
(() => {
  const root = document.documentElement;
  root.classList.add("js");

  // Theme: as the system, light or dark. Nothing is stored.
  const themes = [...document.querySelectorAll(".theme button")];
  for (const button of themes) {
    button.addEventListener("click", () => {
      if (button.value) root.dataset.theme = button.value;
      else delete root.dataset.theme;
      for (const other of themes) other.setAttribute("aria-pressed", String(other === button));
    });
  }

  // Before and after: the pictures are those of the grids below, laid over one another.
  const wipe = document.querySelector(".wipe");
  if (!wipe) return;
  const slider = wipe.querySelector("input");
  const told = wipe.querySelector("output");
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
    told.value = `${slider.value} % before, ${100 - slider.value} % after`;
    slider.setAttribute("aria-valuetext", told.value);
  };
  method.addEventListener("change", choose);
  slider.addEventListener("input", cut);
  choose();
  cut();
})();
