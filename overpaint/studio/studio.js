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
