"""The script by which a source in Redis is read: lease, position and records in one step.

The position is that of a consumer group, which is moved to the last record that is done with
(XGROUP SETID) and has no pending entries, so that Redis's own tools show it, and its lag. A lease
says which process reads. Its value is the process's, with the number of its connection, by which
others find out that it is gone.
"""

from __future__ import annotations

from typing import Final

from clevrd.journal.redis.scripts import Script

# Answers of the script that are no records: another process reads; there is no stream; the group
# is gone; the stream ends before the position.
STANDBY: Final = "STANDBY"
MISSING: Final = "MISSING"
NO_GROUP: Final = "NOGROUP"
WENT_BACK: Final = "WENTBACK"

# KEYS: the stream, the lease. ARGV: the lease's value, its milliseconds, the group, the position,
# records that were ever added up to it (empty for unknown), "1" to keep the position, records at
# most, and the ID that they follow. Returns records ever added, the stream's length, its first and
# its last ID, and records.
_READ: Final = """
local function shorter(a, b)
  if #a ~= #b then return #a < #b end
  return a < b
end
local function before(a, b)
  local am, as = string.match(a, '^(%d+)-(%d+)$')
  local bm, bs = string.match(b, '^(%d+)-(%d+)$')
  if am ~= bm then return shorter(am, bm) end
  return shorter(as, bs)
end
local owner = redis.call('GET', KEYS[2])
if owner and owner ~= ARGV[1] then return redis.error_reply('STANDBY ' .. owner) end
if redis.call('PTTL', KEYS[2]) < ARGV[2] * 2 / 3 then
  redis.call('SET', KEYS[2], ARGV[1], 'PX', ARGV[2])
end
if redis.call('EXISTS', KEYS[1]) == 0 then return redis.error_reply('MISSING no stream') end
local found = redis.call('XINFO', 'STREAM', KEYS[1])
local info = {}
for index = 1, #found, 2 do info[found[index]] = found[index + 1] end
local last = info['last-generated-id']
if before(last, ARGV[4]) then return redis.error_reply('WENTBACK it ends with ' .. last) end
local known = false
for _, group in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
  for index = 1, #group, 2 do
    if group[index] == 'name' and group[index + 1] == ARGV[3] then known = true end
  end
end
if not known then return redis.error_reply('NOGROUP it is gone') end
if ARGV[6] == '1' then
  local kept
  if ARGV[5] == '' then
    kept = redis.pcall('XGROUP', 'SETID', KEYS[1], ARGV[3], ARGV[4])
  else
    kept = redis.pcall('XGROUP', 'SETID', KEYS[1], ARGV[3], ARGV[4], 'ENTRIESREAD', ARGV[5])
  end
  if kept.err then return redis.error_reply(kept.err) end
end
local entries = {}
if tonumber(ARGV[7]) > 0 then
  entries = redis.call('XRANGE', KEYS[1], '(' .. ARGV[8], '+', 'COUNT', ARGV[7])
end
return {info['entries-added'], info['length'], info['recorded-first-entry-id'], last, entries}
"""

# KEYS: the lease. ARGV: the value that it has, another one, its milliseconds. Takes over the lease
# of a process that is gone; returns 1 where it still had that value.
_TAKE_OVER: Final = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
return 1
"""

# KEYS: the lease. ARGV: its value. Gives the lease back.
_GIVE_BACK: Final = """
if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end
return 0
"""

READ: Final = Script(_READ)
TAKE_OVER: Final = Script(_TAKE_OVER)
GIVE_BACK: Final = Script(_GIVE_BACK)
