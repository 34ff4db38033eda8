// Weights of the search: a page comes first when its title, or one of its keywords, holds what is looked for.
const keywords = {
  "recognize": ["my own pictures", "my own images", "my own photos", "own pictures", "predict a new picture", "unknown"],
  "data.folders": ["my own pictures", "my own images", "folder of pictures", "own data"],
  "data.hard_tasks": ["hard task", "hard tasks", "hard task meta-batch", "HT"],
  "models.scale_shift": ["scale and shift", "scaling and shifting", "SS"],
  "train.checkpoints": ["resume", "checkpoint", "save and load"],
  "train.meta_train": ["meta-train", "meta-training", "outer loop"],
  "models.base_learner": ["inner loop"],
  "index": ["install"],
};
// Words of a text without a plural's s. "my" and the like, which the index leaves out, are left out here too.
const words = text => text.toLowerCase().split(/[^\p{L}\p{N}_]+/u).map(o => o.replace(/s$/, "")).filter(o => o.length > 2);
const has = (text, wanted) => wanted.length > 0 && wanted.every(o => words(text).includes(o));

var Scorer = {
  objNameMatch: 11, objPartialMatch: 6, objPrio: {0: 15, 1: 5, 2: -5}, objPrioDefault: 0,
  title: 15, partialTitle: 7, term: 5, partialTerm: 2,
  score: ([page, title, anchor, about, score]) => {
    const wanted = words(new URLSearchParams(location.search).get("q") || "");
    const places = Object.keys(keywords).filter(o => keywords[o].some(phrase => has(phrase, wanted)));
    if (about === null && has(title, wanted)) score += 20;
    if (about === null && places.includes(page)) score += 60 - places.indexOf(page);
    return score;
  },
};

// The lines shown with a result hold no code.
document.addEventListener("DOMContentLoaded", () => {
  if (typeof Search === "undefined") return;
  const htmlToText = Search.htmlToText;
  Search.htmlToText = (html, anchor) => {
    const page = new DOMParser().parseFromString(html, "text/html");
    page.querySelectorAll(".no-search, .cell_input, .cell_output .highlight").forEach(o => o.remove());
    return htmlToText(page.documentElement.outerHTML, anchor);
  };
});
