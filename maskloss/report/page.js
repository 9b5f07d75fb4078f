// Sorts a table by the column whose heading is clicked, and shows a clicked picture at its full size.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  table.tHead.addEventListener("click", (event) => {
    const heading = event.target.closest("th");
    if (!heading) return;
    const column = heading.cellIndex;
    const falling = heading.dataset.order !== "falling";
    for (const other of table.tHead.rows[0].cells) delete other.dataset.order;
    heading.dataset.order = falling ? "falling" : "rising";
    const value = (row) => row.cells[column].textContent;
    const number = (text) => (Number.isNaN(parseFloat(text)) ? -Infinity : parseFloat(text));
    const rows = [...body.rows].sort((a, b) => {
      const order = column === 0 ? value(b).localeCompare(value(a)) : number(value(b)) - number(value(a));
      return falling ? order : -order;
    });
    body.append(...rows);
  });
}
for (const image of document.querySelectorAll(".pair img")) {
  image.addEventListener("click", () => image.classList.toggle("large"));
}
