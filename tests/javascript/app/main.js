// Shows a topic and publishes to it, with the hook of docs/javascript.md, which the test puts beside it.
import { createElement, StrictMode, useState } from "react";
import { createRoot } from "react-dom/client";
import { clevrd, useTopic } from "./hook.js";

function Topic({ topic }) {
	const { events, error } = useTopic(topic);
	const lines = events.map((event) => createElement("li", { key: event.offset }, JSON.stringify(event.data)));
	return createElement("div", null, createElement("ul", { id: topic }, lines), createElement("p", null, error?.message));
}

function App() {
	const [topic, show] = useState("orders");
	const button = (id, onClick) => createElement("button", { id, onClick }, id);
	return createElement(
		"main",
		null,
		topic && createElement(Topic, { topic }),
		button("publish", () => clevrd.publish(topic, { by: "the page" })),
		button("other", () => show("prices")),
		button("none", () => show("")),
	);
}

createRoot(document.querySelector("#root")).render(createElement(StrictMode, null, createElement(App)));
