"""What Redis is asked to do for ``counters_redis``, in its own language. Each script is one step
that nothing comes between. The rules are those of ``limits``; the contract suite tests both.

A scope has a hash (``r:<slice>``, ``t:<slice>``, ``spent:<month>``, ``reserved``) and a sorted set
of leases, ``<id>:<spend>`` by the millisecond of their expiry. Time is Redis's own.
"""

_NOW = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local function whole(number) return string.format('%.0f', number) end
"""

RESERVE = (
    _NOW
    + """
local id, tokens, spend, month = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4]
local slice_ms, slices, lease_ms = tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7])
local index = math.floor(now / slice_ms)
local taken, facts = 1, {}
for n = 1, #KEYS / 2 do
  local hash, leases = KEYS[2 * n - 1], KEYS[2 * n]
  local lost = redis.call('ZRANGEBYSCORE', leases, '-inf', now)
  if #lost > 0 then
    local sum = 0
    for _, member in ipairs(lost) do sum = sum + tonumber(string.match(member, ':(%d+)$')) end
    redis.call('ZREMRANGEBYSCORE', leases, '-inf', now)
    redis.call('HINCRBY', hash, 'reserved', whole(-sum))
  end
  local requests, used, spent, reserved, list, old = 0, 0, 0, 0, {}, {}
  local held = redis.call('HGETALL', hash)
  for i = 1, #held, 2 do
    local kind, at = string.match(held[i], '^(%a+):(%d+)$')
    local amount = tonumber(held[i + 1])
    if held[i] == 'reserved' then reserved = amount
    elseif kind == 'spent' then
      if at == month then spent = amount
      elseif tonumber(at) < tonumber(month) then old[#old + 1] = held[i] end
    elseif tonumber(at) <= index - slices then old[#old + 1] = held[i]
    else
      if kind == 'r' then requests = requests + amount else used = used + amount end
      list[#list + 1] = {kind, tonumber(at), amount}
    end
  end
  if #old > 0 then redis.call('HDEL', hash, unpack(old)) end
  local ongoing = redis.call('ZCARD', leases)
  local base = 7 + 4 * (n - 1)
  local rpm, tpm = tonumber(ARGV[base + 1]), tonumber(ARGV[base + 2])
  local at_once, budget = tonumber(ARGV[base + 3]), tonumber(ARGV[base + 4])
  local gone = spent + reserved
  if (budget >= 0 and (gone + spend > budget or gone >= budget))
    or (at_once >= 0 and ongoing >= at_once)
    or (rpm >= 0 and requests + 1 > rpm)
    or (tpm >= 0 and used + tokens > tpm) then taken = 0 end
  facts[n] = {ongoing, whole(spent), whole(reserved), list}
end
if taken == 1 then
  for n = 1, #KEYS / 2 do
    local hash, leases = KEYS[2 * n - 1], KEYS[2 * n]
    redis.call('HINCRBY', hash, 'r:' .. index, 1)
    redis.call('HINCRBY', hash, 't:' .. index, whole(tokens))
    redis.call('HINCRBY', hash, 'reserved', whole(spend))
    redis.call('ZADD', leases, now + lease_ms, id .. ':' .. whole(spend))
    redis.call('EXPIRE', hash, 3456000)
    redis.call('EXPIRE', leases, 3456000)
    local list = facts[n][4]
    list[#list + 1] = {'r', index, 1}
    list[#list + 1] = {'t', index, tokens}
  end
end
return {taken, index, now, facts}
"""
)
"""Takes from all scopes or none. Answers whether it did, the slice, the time (ms), and for each
scope: leases, spent, reserved, and the slices of its window (those just taken included)."""

SETTLE = (
    _NOW
    + """
if not redis.call('SET', KEYS[1], 1, 'NX', 'EX', 3600) then return 0 end
local member, held = ARGV[1], tonumber(ARGV[2])
local requests, more = tonumber(ARGV[3]), tonumber(ARGV[4])
local slice, spend, month = tonumber(ARGV[5]), tonumber(ARGV[6]), ARGV[7]
local index = math.floor(now / tonumber(ARGV[8]))
local counts = slice > index - tonumber(ARGV[9])
for n = 1, (#KEYS - 1) / 2 do
  local hash, leases = KEYS[2 * n], KEYS[2 * n + 1]
  if redis.call('ZREM', leases, member) == 1 then
    redis.call('HINCRBY', hash, 'reserved', whole(-held))
  end
  if requests > 0 then redis.call('HINCRBY', hash, 'r:' .. index, whole(requests)) end
  if requests < 0 and counts then redis.call('HINCRBY', hash, 'r:' .. slice, whole(requests)) end
  if more > 0 then redis.call('HINCRBY', hash, 't:' .. index, whole(more)) end
  if more < 0 and counts then redis.call('HINCRBY', hash, 't:' .. slice, whole(more)) end
  redis.call('HINCRBY', hash, 'spent:' .. month, whole(spend))
  redis.call('EXPIRE', hash, 3456000)
end
return 1
"""
)
"""Counts what was really used; once, however often it is sent."""

RENEW = (
    _NOW
    + """
for _, leases in ipairs(KEYS) do
  redis.call('ZADD', leases, 'XX', now + tonumber(ARGV[2]), ARGV[1])
end
return 1
"""
)
"""The request of this lease still runs."""

SPENT = """
local field = 'spent:' .. ARGV[1]
if tonumber(redis.call('HGET', KEYS[1], field) or 0) < tonumber(ARGV[2]) then
  redis.call('HSET', KEYS[1], field, ARGV[2])
  redis.call('EXPIRE', KEYS[1], 3456000)
end
return 1
"""
"""The ledger knows of this much."""
