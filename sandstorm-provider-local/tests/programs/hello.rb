require "json"

puts "hello #{$stdin.gets.strip} #{JSON.parse(JSON.generate(ARGV)).join(',')}"
warn "warned"
exit 3
