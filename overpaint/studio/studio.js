// Mark the parts of the page that are wider than their place, so that the hint above them is shown.
(() => {
  const mark = () => {
    for (const part of document.querySelectorAll('.op-scroll')) {
      const wide = part.scrollWidth > part.clientWidth + 1;
      if (part.classList.contains('op-wide') !== wide) part.classList.toggle('op-wide', wide);
      const hint = part.previousElementSibling;
      if (hint?.classList.contains('op-scroll-hint') && hint.hidden === wide) hint.hidden = !wide;
    }
  };
  let due = 0;
  const later = () => { cancelAnimationFrame(due); due = requestAnimationFrame(mark); };
  const watch = () => new MutationObserver(later).observe(document.body, {childList: true, subtree: true});
  addEventListener('resize', later);
  addEventListener('click', later);  // a tab that was hidden has no width
  if (document.body) watch(); else addEventListener('DOMContentLoaded', watch);
})();

// Show a box on the picture of the lettering tab; `box` is x, y, width and height as shares of the picture.
function opShowBox(frame, box) {
  const mark = frame.querySelector('.op-box');
  ['left', 'top', 'width', 'height'].forEach((side, i) => { mark.style[side] = `${100 * box[i]}%`; });
  mark.hidden = false;
}

// Show the box of a region in the text field, four numbers in pixels; hide it while the text has another form.
function opShowRegion(text) {
  const frame = document.querySelector('#op-letter-picture .op-draw');
  if (!frame) return;
  const values = String(text ?? '').trim().split(/[\s,;]+/).map(Number);
  const valid = values.length === 4 && values.every(Number.isFinite) && values[2] > 0 && values[3] > 0;
  frame.querySelector('.op-box').hidden = !valid;
  const sizes = [frame.dataset.width, frame.dataset.height, frame.dataset.width, frame.dataset.height];
  if (valid) opShowBox(frame, values.map((value, i) => value / sizes[i]));
}
