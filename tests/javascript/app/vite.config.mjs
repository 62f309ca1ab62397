// As behind a proxy: the daemon is under a path of the page's own server.
const rewrite = (path) => path.slice("/events".length);
const proxy = { "/events": { target: process.env.DAEMON, ws: true, rewrite } };

export default { preview: { host: "127.0.0.1", port: 0, proxy } };
