#!/usr/bin/env ruby
# frozen_string_literal: true

# Sends each line back as `[pid] line`, one client after another; `quit` closes.
#
#     SocketProtector --workers 4 4321 -- ruby echo.rb 4321
#     ruby echo.rb 4321                 # without a protector
#
# Ruby's socket library has recvmsg.  MSG_DONTWAIT leaves the channel's flags alone, which all workers
# share.  Received descriptors are close-on-exec.
require 'socket'

CONTROL_BYTES = 20 # CMSG_LEN of one descriptor on a 64-bit machine

# Takes one connection and returns its socket; nil if none waits, :end at end of file.
def take(channel)
  header, _, _, *control = channel.recvmsg_nonblock(
    16, Socket::MSG_DONTWAIT, CONTROL_BYTES, scm_rights: true, exception: false
  )
  return nil if header == :wait_readable

  client = control.find { |each| each.cmsg_is?(:SOCKET, :RIGHTS) }&.unix_rights&.first
  return :end if header.nil? || (header.empty? && client.nil?)
  raise 'a connection is lost: no descriptor left' if client.nil?

  version, kind, _listener, _length, _accepted_at_ns = header.unpack('CCS<L<Q<')
  raise "cannot read a message of version #{version}" unless version == 1 && kind == 1

  client
end

def notify(lines)
  name = ENV['NOTIFY_SOCKET'] or return
  Socket.open(:UNIX, :DGRAM) do |line|
    # Addrinfo.unix keeps an abstract name's length.  Connected, because Ruby's sendmsg then waits until
    # the protector's queue has room; READY=1 is sent only once.
    line.connect(Addrinfo.unix(name.sub(/\A@/, "\0")))
    line.sendmsg(lines, Socket::MSG_NOSIGNAL)
  end
rescue SystemCallError
  nil # a lost message must not end the worker
end

def inherited(name)
  Socket.for_fd(Integer(ENV.fetch(name), 10)).tap { |line| line.close_on_exec = true }
end

# With a pipe, because a signal right before select would go unnoticed.
WAKE, RING = IO.pipe
trap('TERM') { RING.write_nonblock("\0", exception: false) }

# Returns the readable descriptors among `lines`; none after SIGTERM.
def wait_for(*lines)
  readable, = IO.select([WAKE, *lines])
  readable.include?(WAKE) ? [] : readable
end

def serve(client)
  text = +''
  until wait_for(client).empty?
    text << client.readpartial(65_536)
    while (line = text.slice!(/\A[^\n]*\n/))
      return if line == "quit\n"

      client.write("[#{Process.pid}] #{line}")
    end
  end
rescue EOFError, SystemCallError
  nil # the client hung up
ensure
  client.close
end

unless ENV.key?('SOCKETPROTECTOR_CHANNEL')
  listener = TCPServer.new(*[ARGV[1], ARGV.fetch(0)].compact)
  until wait_for(listener).empty?
    client = listener.accept_nonblock(exception: false)
    serve(client) unless client == :wait_readable
  end
  exit 0
end

channel = inherited('SOCKETPROTECTOR_CHANNEL')
line = inherited('SOCKETPROTECTOR_RETURN')
notify("READY=1\nX_SOCKETPROTECTOR_RETIRE=1")
until (readable = wait_for(line, channel)).empty?
  # Only the end of the line counts: a newer protector may send messages on it.
  break if readable.include?(line) && line.recv(64).to_s.empty? # nil since Ruby 3.3

  client = take(channel) or next # another worker may have been quicker
  break if client == :end

  client.sync = true
  serve(client)
end
