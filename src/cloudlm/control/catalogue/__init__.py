"""What the market offers: devices, machines that have them, and regions, each row with where its
figure was read and when. ``words`` says what a row means, ``files`` reads the shipped rows or those
of the user, ``skypilot`` reads published lists into them."""
