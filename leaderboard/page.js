"use strict";

// Sorting: a click on a heading orders the ranked rows; a second click turns the order round. Rows without a value
// stay last, and reference rows stay in their own section below.
for (const ranked of document.querySelectorAll("tbody[data-ranked]")) {
  for (const button of ranked.closest("table").querySelectorAll("thead button")) {
    button.addEventListener("click", () => {
      const heading = button.closest("th");
      const column = heading.cellIndex;
      const first = heading.dataset.first;
      const second = first === "ascending" ? "descending" : "ascending";
      const order = heading.getAttribute("aria-sort") === first ? second : first;
      for (const other of heading.parentElement.cells) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      const rows = [...ranked.rows];
      rows.sort((a, b) => {
        const x = a.cells[column].dataset.value, y = b.cells[column].dataset.value;
        if (x === "" || y === "") return (x === "") - (y === "");
        return sign * (heading.dataset.text === undefined ? x - y : x.localeCompare(y, undefined, {numeric: true}));
      });
      ranked.append(...rows);
    });
  }
}

// Images: show the block of the chosen variant and subject.
for (const part of document.querySelectorAll(".images")) {
  const choices = [...part.querySelectorAll(".choose select")];
  const show = () => {
    const wanted = choices.map((choice) => choice.value).join("/");
    let found = false;
    for (const block of part.querySelectorAll(".gallery")) {
      block.hidden = block.dataset.block !== wanted;
      found ||= !block.hidden;
    }
    part.querySelector(".no-images").hidden = found;
  };
  for (const choice of choices) choice.addEventListener("change", show);
  show(); // a browser may bring back an earlier choice when the page is loaded again
}
