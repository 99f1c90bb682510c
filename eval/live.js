// Ask for the page again and again, and change what has changed. What the reader has opened, scrolled or selected stays.
"use strict";
const EVERY = 2000; // milliseconds
const GONE = "eggroll-llm watch has ended; this page shows what it said last";
let tag = "";

function renew(old, now) {
  if (old.nodeName !== now.nodeName) {
    old.replaceWith(now);
    return;
  }
  if (old.nodeType === Node.TEXT_NODE) {
    if (old.data !== now.data) old.data = now.data;
    return;
  }
  if (old.nodeType !== Node.ELEMENT_NODE) return;
  for (const { name } of [...old.attributes]) if (name !== "open" && !now.hasAttribute(name)) old.removeAttribute(name);
  for (const { name, value } of now.attributes) if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  const before = [...old.childNodes];
  const after = [...now.childNodes];
  after.forEach((child, i) => (i < before.length ? renew(before[i], child) : old.append(child)));
  before.slice(after.length).forEach((child) => child.remove());
}

async function refresh() {
  try {
    const answer = await fetch("/", { headers: { "If-None-Match": tag }, cache: "no-store" });
    if (answer.status === 200) {
      const next = new DOMParser().parseFromString(await answer.text(), "text/html");
      document.title = next.title;
      for (const part of ["header", "main"]) renew(document.querySelector(part), next.querySelector(part));
      tag = answer.headers.get("ETag");
    }
  } catch {
    tag = "";
    document.querySelector(".status").textContent = GONE;
  }
  setTimeout(refresh, EVERY);
}

setTimeout(refresh, EVERY);
